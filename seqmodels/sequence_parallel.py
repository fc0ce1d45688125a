"""Sequence parallelism: each rank holds one stretch of every sequence, and the model computes what one rank would.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "sequence"))  # 2 batches at once, 4 ranks each
    model = parallelise(model, mesh)                      # the same weights on every rank
    loss, _ = model.loss(split(batch, mesh))              # batch: this data rank's rows, whole; loss: that of the whole
    loss.backward()
    reduce_gradients(model, mesh)                         # sum over "sequence", mean over "data"

Of l steps each of w ranks takes s = ceil(l / w), one after the other; the last takes what is left, at least one.
A state S passes a stretch as a S + E (a: its decay, E: its own end state), the gradient G of a state as a G + F back:

    S[i+1] = a[i] S[i] + E[i],        G[i] = a[i] G[i+1] + F[i]

so ranks exchange (a, E) forward and F backward, one state per layer, besides the k - 1 inputs that the convolution and
k-mers see of the stretch before (kernels/across.py, kernels/README.md). Nothing else crosses ranks but pooled features
and the sums of the loss. A reversed mixer's ranks pass states in reverse order. Packed sequences and right padding may
lie anywhere. States handed in and out are the whole sequence's, the same on every rank.

What every rank must do: call forward and backward alike, with the same initial state. Gradients of what all ranks share
(weights, initial states, conditions) are the sum over ranks; `loss` is the whole's value on every rank, with the
gradient of the rank's own part. Three ways to train:
- a plain loop, as above;
- DistributedDataParallel over mesh["data"].get_group(), which takes the mean over data; then after each backward
  reduce_gradients(model, mesh["sequence"]);
- DistributedDataParallel or FSDP over all ranks, which take the mean over all: the backward of loss * mesh["sequence"].
  size() is then all there is to do, and FSDP shards the weights over all GPUs.
The data loader gives the ranks of one "sequence" group the same rows; seed their dropout apart. The trainer does all
this in the third way: TrainingConfig.sequence_parallel, `--training.sequence-parallel` of the commands.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from seqmodels.backbone import Backbone, KmerEmbedding
from seqmodels.baselines import Attention, Convolution, Recurrent
from seqmodels.errors import InputError
from seqmodels.heads import Model
from seqmodels.kernels.across import Exchange
from seqmodels.mixers import Bidirectional, Mamba, Mamba2
from seqmodels.multiscale import Multiscale

_SPLIT = ("ids", "targets", "weights", "seq_idx")  # of a batch, what has a step dimension


def parallelise(model: Model, mesh: DeviceMesh) -> Model:
    """The model itself, whose calls from now on take this rank's stretch; mesh has a dimension "sequence"."""
    check_shareable(model)
    group = _dimension(mesh, "sequence").get_group()
    ranks = Ranks(group) if dist.get_world_size(group) > 1 else None
    for module in model.modules():
        if isinstance(module, (Model, KmerEmbedding, Mamba, Mamba2)):
            module.ranks = ranks
    for module in model.modules():
        if isinstance(module, Bidirectional) and ranks is not None:
            module.mamba_rev.ranks = Ranks(group, backwards=True)
    return model


def check_shareable(model: nn.Module) -> None:
    """Refuses models with parts that would need the steps of other ranks."""
    for module in model.modules():
        if isinstance(module, Backbone) and module.strands is not None:
            raise InputError(
                "a model of both strands needs the whole sequence on each rank; leave strands out, or use data "
                "parallelism alone"
            )
        if isinstance(module, Multiscale) and len(module.pool):
            raise InputError(
                "a U-Net pools steps across stretches and cannot share a sequence between ranks; use a flat backbone "
                "of Mamba or Mamba-2 layers, or data parallelism alone"
            )
        if isinstance(module, (Attention, Recurrent, Convolution)):
            kind = {Attention: "attention", Recurrent: "an RNN", Convolution: "a centred convolution"}[type(module)]
            raise InputError(
                f"{kind} cannot share a sequence between ranks; use Mamba or Mamba-2 layers (also bidirectional), or "
                "data parallelism alone"
            )
    if isinstance(model, Model) and model.config.head.supervise_every:
        raise InputError("supervised prefixes end within stretches; set head.supervise_every=0 to share a sequence")


def stretch(length: int, mesh: DeviceMesh) -> slice:
    """The steps of this rank: ceil(length / ranks) of them, or what is left for the last."""
    ranks = _dimension(mesh, "sequence")
    size, place = -(-length // ranks.size()), ranks.get_local_rank()
    if (ranks.size() - 1) * size >= length:
        raise InputError(
            f"{length} steps in stretches of {size} leave nothing for the last of {ranks.size()} ranks; use at most "
            f"{-(-length // size)} ranks per sequence, or longer sequences"
        )
    return slice(place * size, min((place + 1) * size, length))


def split(batch: Any, mesh: DeviceMesh) -> Any:
    """This rank's stretch of a tensor (b, l, ...), or of a batch as `loss` takes: its lengths become the stretch's."""
    if isinstance(batch, Tensor):
        return batch[:, stretch(batch.shape[1], mesh)]
    steps = stretch(batch["ids"].shape[1], mesh)
    whole = batch["ids"].shape[1:]  # labels of packed sequences are no steps
    part = {name: t[:, steps] if name in _SPLIT and t.shape[1:] == whole else t for name, t in batch.items()}
    if "lengths" in batch:
        part["lengths"] = (batch["lengths"] - steps.start).clamp(0, steps.stop - steps.start)
    return part


@torch.no_grad()
def reduce_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """After backward, in place: gradients summed over "sequence" and averaged over "data", where the mesh has them."""
    names, parameters = mesh.mesh_dim_names or (), [p for p in model.parameters() if p.requires_grad]
    for dtype in {p.dtype: None for p in parameters}:  # in order: every rank must come to the same exchanges
        alike = [p for p in parameters if p.dtype == dtype]
        for p in alike:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in alike])
        for name in names:
            if name in ("data", "sequence"):
                dist.all_reduce(flat, group=mesh[name].get_group())
        if "data" in names:
            flat /= mesh["data"].size()
        for p, gradient in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            p.grad.copy_(gradient.view_as(p))


class Ranks:
    """The ranks that share each sequence, in the order in which a mixer reads it."""

    def __init__(self, group: dist.ProcessGroup, backwards: bool = False) -> None:
        self.group, self.backwards, self.size = group, backwards, dist.get_world_size(group)
        self.place = self.size - 1 - dist.get_rank(group) if backwards else dist.get_rank(group)

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self  # a process group cannot be copied, and the copy of a model shares it

    def gather(self, t: Tensor) -> Tensor:
        """The same tensor of every rank, (ranks, ...); differentiable."""
        return _Gather.apply(t, self)

    def total(self, t: Tensor) -> Tensor:
        """The sum over ranks, without a gradient."""
        t = t.detach().clone()
        dist.all_reduce(t, group=self.group)
        return t

    def whole(self, part: Tensor) -> Tensor:
        """The sum over ranks, whose gradient on each rank is that of its own part."""
        return part + (self.total(part) - part.detach())

    def exchange(self, lengths: Tensor | None, seq_idx: Tensor | None) -> Exchange:
        """What the kernels exchange by; seq_idx (b, l) and lengths (b,) of this rank's stretch."""
        if seq_idx is None:
            return Exchange(self.gather, self.place)
        edges = self.gather(torch.stack([seq_idx[:, 0], seq_idx[:, -1]]))  # (ranks, 2, b)
        continues = edges[self.place, 0] == edges[self.place - 1, 1]
        if lengths is not None:  # an empty stretch hands on what it is given
            continues = continues | (lengths == 0)
        return Exchange(self.gather, self.place, continues if self.place else torch.ones_like(continues))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        t = t.contiguous()
        parts = [torch.empty_like(t) for _ in range(ranks.size)]
        dist.all_gather(parts, t, group=ranks.group)
        return torch.stack(parts[::-1] if ranks.backwards else parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # in the ranks' own order, so that all add the same
        gradient = gradient.flip(0) if ctx.ranks.backwards else gradient.clone()
        dist.all_reduce(gradient, group=ctx.ranks.group)
        return gradient[dist.get_rank(ctx.ranks.group)], None


def _dimension(mesh: DeviceMesh, name: str) -> DeviceMesh:
    if name not in (mesh.mesh_dim_names or ()):
        raise InputError(f"the mesh has the dimensions {mesh.mesh_dim_names}; name one of them {name!r}")
    return mesh[name]
