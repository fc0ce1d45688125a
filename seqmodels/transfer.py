"""A new model begins with the weights of another: as many as fit, the rest as it was made."""

import torch
from torch import Tensor

from seqmodels.checkpoint import read, resolve
from seqmodels.config import ModelConfig, MultiscaleConfig
from seqmodels.errors import InputError
from seqmodels.heads import Model


def take_over(model: Model, start_from: str) -> tuple[int, int]:
    """Copies the tensors of a checkpoint (name or folder) that fit the model; how many those are, and of how many.

    They fit where name and shape agree; of conditions and labels, where name and value do.
    """
    (before, tensors), taken = read(resolve(start_from)), []
    tensors = _labelled_as(model, before, _told_as(model, before, tensors))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors and tensors[name].shape == parameter.shape:
                parameter.copy_(tensors[name])
                taken.append(name)
    if not taken:
        raise InputError(f"{start_from}: no tensor of this checkpoint fits the new model; check the sizes of both")
    return len(taken), len(tensors)


def _told_as(model: Model, before: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, with tables for the model's conditions instead of its own.

    Values of equal name of conditions of equal name keep their rows, others have those of the model. What the model is
    not told counts as not given: its row is added to what every position gets anyway, the embedding of a token or the
    bias of a pooled step (of a tied head all logits then grow by the same, which changes no probability).
    """
    if not before.conditions:
        return tensors
    tensors, now = dict(tensors), model.config.conditions
    stages = len(before.backbone.stages) if isinstance(before.backbone, MultiscaleConfig) else None
    for stage in range(stages or 1):
        at = "backbone.conditions." + ("" if stages is None else f"{stage}.")
        shared = "backbone.embedding.weight" if stage == 0 else f"backbone.pool.{stage - 1}.bias"
        tables = [tensors.pop(f"{at}tables.{i}.weight") for i in range(len(before.conditions))]
        for condition, table in zip(before.conditions, tables, strict=True):
            if condition.name not in (names := [c.name for c in now]):
                tensors[shared] = tensors[shared] + table[-1]
                continue
            i = names.index(condition.name)
            own = model.state_dict().get(name := f"{at}tables.{i}.weight")
            if own is None or own.shape[1] != table.shape[1]:  # layers of another form
                continue
            rows = [condition.values.index(v) if v in condition.values else None for v in now[i].values]
            new = [own[j] if row is None else table[row].to(own) for j, row in enumerate(rows)]
            tensors[name] = torch.stack([*new, table[-1].to(own)])
    return tensors


def _labelled_as(model: Model, before: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, with a classifier's rows for the model's labels: those of equal name, others its own."""
    was, now, own = before.head.labels, model.config.head.labels, model.state_dict()
    if was == now or "score.weight" not in own:
        return tensors
    tensors = dict(tensors)
    for name in {"score.weight", "score.bias"} & set(tensors):
        if tensors[name].shape[1:] != own[name].shape[1:]:  # layers of another form
            continue
        rows = [tensors[name][was.index(label)] if label in was else own[name][i] for i, label in enumerate(now)]
        tensors[name] = torch.stack([row.to(own[name]) for row in rows])
    return tensors
