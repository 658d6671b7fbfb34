"""A policy spread over the processes of a group (FSDP2), for models that fit none of them: each keeps a share of every
weight, of its gradient and of the optimiser's state, and a layer is gathered while it is computed.

Every rank makes the same number of forwards and backwards: they wait for each other in each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcts.engines.model import Policy
from selfplay.forward import Outputs, forward
from selfplay.group import losses
from selfplay.packing import Packed


@dataclass(slots=True)
class ShardedPolicy(Policy):
    """`model` and `head` hold shares; they compute only within `whole`, which `forward.forward` calls."""

    whole: Any = None
    skeleton: Policy | None = None
    """The policy without storage for its weights: what `gather` fills to be saved."""


class _Whole(nn.Module):
    """All of a forward in one module call: what FSDP hangs its hooks on."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self.head = policy.head
        self._policy = policy

    def forward(self, packed: Packed, tree_mask: bool, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        found = forward(self._policy, packed, tree_mask=tree_mask, entropy=entropy)
        values = None if found.value_logits is None else found.value_logits.clone()  # FSDP takes no views
        return found.logprobs, values, found.entropy


def shard(policy: Policy, device: str) -> ShardedPolicy:
    """Spread a policy, the same on every rank and on CPU, over the default process group's devices of kind `device`.
    The weights move there layer by layer, so that none of the devices ever holds them all."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    skeleton = _skeleton(policy)
    whole: Any = _Whole(policy)
    layers = [module for module in policy.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in [*layers, whole]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in whole.modules():
        if isinstance(module, FSDPModule):  # gradients are summed; gloo knows no other way than a plain sum
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return ShardedPolicy(policy.model, policy.tokenizer, policy.head, whole, skeleton)


def _skeleton(policy: Policy) -> Policy:
    """A copy whose parameters have shapes alone."""
    copied: dict[int, Any] = {}
    for module in (policy.model, policy.head):
        for parameter in () if module is None else module.parameters():
            copied[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    model, head = copy.deepcopy((policy.model, policy.head), copied)
    return Policy(model, policy.tokenizer, head)


def backward(
    outputs: Outputs, loss_of: Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]], *, share: float, idle: bool
) -> tuple[Tensor, dict[str, Tensor], str]:
    """Add a batch's gradient, `share` times that of its loss, to the shares that the ranks keep; the loss, its parts,
    and which outputs it reaches: a 0 or 1 for the log-probabilities and for the values.

    Parameters that the loss does not reach get zeros, or the ranks would not exchange the same numbers; so does
    everything with `idle`, for a rank that has no batch where others have one.
    """
    found = [output for output in (outputs.logprobs, outputs.value_logits) if output is not None]
    leaves = [output.detach().requires_grad_() for output in found]
    loss = outputs.logprobs.new_zeros(())
    parts: dict[str, Tensor] = {}
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if not idle:
        loss, parts = loss_of(Outputs(leaves[0], leaves[1] if len(leaves) > 1 else None, outputs.entropy))
        if loss.requires_grad:
            gradients = torch.autograd.grad(share * loss, leaves, allow_unused=True)
    given = [
        (output, torch.zeros_like(output) if gradient is None else gradient)
        for output, gradient in zip(found, gradients, strict=True)
        if output.requires_grad
    ]
    if given:
        with losses():
            torch.autograd.backward([output for output, _ in given], [gradient for _, gradient in given])
    reached = "".join("01"[gradient is not None] for gradient in gradients).ljust(2, "0")
    return loss.detach(), parts, reached


def drop_unreached(policy: ShardedPolicy, reached: Sequence[str]) -> None:
    """Take away the zero gradients of what no batch of the step reached (`backward`, of all batches), as if it had
    never been computed: the optimiser leaves such parameters alone."""
    logprobs, values = (any(each[place] == "1" for each in reached) for place in (0, 1))
    model: Any = policy.model
    unreached: list[Any] = []
    if not logprobs and not values:
        unreached.append(policy.whole)
    if not values:
        unreached.append(policy.head)
    if not logprobs:
        output = model.get_output_embeddings()
        unreached.append(None if output.weight is model.get_input_embeddings().weight else output)
    for module in unreached:
        for parameter in () if module is None else module.parameters():
            parameter.grad = None


def gather(policy: ShardedPolicy, *, keep: bool) -> Policy:
    """The complete policy on CPU, on ranks with `keep`; without weights elsewhere. Every rank calls it."""
    assert policy.skeleton is not None
    pairs: list[tuple[Any, Any]] = [(policy.model, policy.skeleton.model), (policy.head, policy.skeleton.head)]
    for sharded, plain in pairs:
        if sharded is None or plain is None:
            continue
        weights = {name: complete(tensor, keep=keep) for name, tensor in sharded.state_dict().items()}
        if keep:
            plain.load_state_dict(weights, assign=True)
            if hasattr(plain, "tie_weights"):
                plain.tie_weights()
    return policy.skeleton


def complete(value: Any, *, keep: bool) -> Any:
    """`value` with each sharded tensor in it gathered on CPU, on ranks with `keep`; elsewhere empty in its place."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        whole: Any = value.detach()
        with losses():
            full = whole.full_tensor()
        return full.cpu() if keep else torch.empty(0)
    if isinstance(value, Mapping):
        return {name: complete(each, keep=keep) for name, each in value.items()}
    if isinstance(value, list):
        return [complete(each, keep=keep) for each in value]
    return value


def spread(state: dict[str, Any], parameters: Sequence[Any]) -> dict[str, Any]:
    """An optimiser's complete state dict (of `parameters`, in their order), each rank its share."""
    from torch.distributed.tensor import distribute_tensor

    def share_of(parameter: Any, entry: Any) -> Any:
        if not torch.is_tensor(entry) or not entry.ndim:
            return entry
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(entry.to(parameter.device), mesh, placements, src_data_rank=None)

    entries = {
        number: {name: share_of(parameters[number], entry) for name, entry in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": entries}
