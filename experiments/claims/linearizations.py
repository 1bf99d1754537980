"""What claims on linearization share: a small teacher that is trained here, and its students."""

from collections.abc import Sequence

import jax

from configs import linearize_teacher
from experiments.linearization import comparison

OURS = (
    "A softmax transformer of 0.8M parameters (4 layers of width 128), trained here for 500 steps "
    "of 2,048 bytes of Python's standard library, in place of {teacher}; students trained for "
    "{steps} on the same text, windows of 4 tokens in place of 64, since so small a teacher's "
    "attention is short. "
)


def students(context, methods: Sequence[str], scale: float) -> dict[str, dict]:
    """Returns each method's scores by its name: perplexity, map_kl, tokens; also the teacher's.

    methods: configs of configs/linearize, as "liger:ungated".
    scale: of the steps that the config's argument `small` takes.
    """
    teacher = context.train(linearize_teacher.get_config(), {"train.steps": 500})

    def change(config):
        config.mesh.data = 1
        if not context.smoke:
            for stage in config.linearize.stages.values():
                stage.steps = round(scale * stage.steps)

    with context.work("students", str(teacher.workdir), list(methods), scale) as folder:
        return comparison.compare(
            str(teacher.workdir),
            list(methods),
            folder,
            argument="tiny" if context.smoke else "small",
            contexts=(),
            change=change,
            devices=jax.devices()[:1],
        )
