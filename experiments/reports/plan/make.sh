#!/bin/sh
# Writes what is kept here, from the repository's root (pip install -e '.[train,tpu]'); needs no
# accelerator. Each of the 23 programs takes two to three minutes of one core to compile. Calls with
# the same --out put their plans beside one another.
set -e
plan="python -m experiments.plan"
kept=experiments/reports/plan
# The 1.3B config's batch of half a million tokens on 8, 32, 128 and 256 chips. It has 128 rows, so
# 256 chips split time as well.
large="--config=configs/gated_delta_net_1300m.py --out=$kept/1300m"
$plan $large --topology=v5p:2x2x2,v5p:2x4x4,v5p:4x4x8 --mesh=fsdp=-1
$plan $large --topology=v5p:2x4x4 --mesh=data=4,fsdp=8
$plan $large --topology=v5p:4x4x8 --mesh=data=16,fsdp=8
$plan $large --topology=v5p:4x8x8 --mesh=data=8,fsdp=8,seq=4
# One sequence of a million tokens through the 340M config.
$plan --config=configs/delta_net_340m.py --topology=v5p:2x4x4 --mesh=seq=32 \
    --tokens_per_device=32768 --out=$kept/340m_million
# 32k to 4M tokens at 32k per chip, by each collective: the 340M config's sizes with gated linear
# attention.
gla="--config=configs/delta_net_340m.py --config.model.pattern=gla(num_heads=4)"
gla="$gla --tokens_per_device=32768 --out=$kept/lengths"
$plan $gla --topology=v5p:2x2x1 --mesh=data=4
$plan $gla --topology=v5p:2x2x1,v5p:2x2x4,v5p:2x4x4,v5p:4x4x4,v5p:4x4x8 --mesh=seq=-1 \
    --collective=all_gather,all_scan,ring
