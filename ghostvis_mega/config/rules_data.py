"""Rules of blending several datasets, as sentences."""

from collections.abc import Iterator

from ghostvis_mega.config.schema import RunConfig


def blend_problems(cfg: RunConfig) -> Iterator[str]:
    """Broken rules of `data.blend` and `data.blend_changes`."""
    data = cfg.data
    if not data.blend:
        if data.blend_changes:
            yield (
                "data.blend_changes changes the weights of data.blend, which is empty. Fill "
                "data.blend, or remove the changes."
            )
        return
    paths = [entry.path for entry in data.blend]
    for path in dict.fromkeys(paths):
        if paths.count(path) > 1:
            yield (
                f"data.blend names {path} {paths.count(path)} times. Keep one entry and add up its "
                "weights."
            )
        if path == data.heldout:
            yield (
                f"data.blend trains on data.heldout={path}: an accuracy on it would be of learning "
                "by heart. Leave it out."
            )
    if data.train not in paths:
        yield (
            f"data.train={data.train} is not in data.blend, so it would not be trained on. Set "
            f"data.train to one of data.blend, such as {paths[0]}, or add it there."
        )
    yield from _weight_problems(cfg)


def _weight_problems(cfg: RunConfig) -> Iterator[str]:
    data = cfg.data
    count, steps = len(data.blend), [change.step for change in data.blend_changes]
    named = [("data.blend", tuple(entry.weight for entry in data.blend))]
    for number, change in enumerate(data.blend_changes):
        named.append((f"data.blend_changes[{number}].weights", change.weights))
        if len(change.weights) != count:
            yield (
                f"data.blend_changes[{number}].weights has {len(change.weights)} weights for the "
                f"{count} datasets of data.blend. Give one for each, in the same order."
            )
        if change.step >= cfg.train.steps:
            yield (
                f"data.blend_changes[{number}].step={change.step} is not before the last step: "
                f"train.steps={cfg.train.steps}. Use a smaller step, or remove the change."
            )
    for name, weights in named:
        if not any(weights):
            yield f"{name} has no weight above 0, so there is nothing to train on. Raise one."
    if steps != sorted(set(steps)):
        yield f"data.blend_changes has the steps {steps}: list them ascending, each once."
    for place, entry in enumerate(data.blend):
        if all(len(weights) == count and weights[place] == 0 for _, weights in named):
            yield (
                f"data.blend[{place}] ({entry.path}) has weight 0 from the first step to the last. "
                "Give it a weight, or remove it."
            )
