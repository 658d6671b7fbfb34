"""A Llama's layers with hand-written gradients, for small models on CPU where small operators cost more than the
matrix products.

What it saves: the weights of a norm are folded into the matrix after it; q, k and v, and gate and up, are one product
each; rotary positions are one complex product; intermediate results that autograd would keep are recomputed or never
made; and the last layer is computed only for the tokens that somebody reads. It gives the hidden states of
`model.base_model` up to rounding, which `forward.check_kernels` proves before it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHORT = 128
"""Longest row for which the attention probabilities are kept."""


STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles depend on the position alone, not on the length of the sequence."""


def supports(model: Any) -> bool:
    """Whether `hidden_states` computes this model: a plain fp32 LlamaForCausalLM on CPU with as many key heads as
    heads, no biases, no dropout and no adapters."""
    from transformers import LlamaForCausalLM

    if type(model) is not LlamaForCausalLM or model.device.type != "cpu" or model.dtype != torch.float32:
        return False
    config = model.config
    plain = (
        config.num_key_value_heads == config.num_attention_heads
        and config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and not config.attention_dropout
        and config.head_dim % 2 == 0
        and config.rope_parameters["rope_type"] in STATIC_ROPE
    )
    return plain and all(type(module) is nn.Linear for layer in model.model.layers for module in _linears(layer))


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """Final hidden states (after the last norm) of the tokens at the flat indices `wanted` [W] of a batch [B, L]:
    [W, d]. `mask` [B, 1, L, L] is additive, `position_ids` [B, L]."""
    base = model.model
    config = model.config
    heads, size = config.num_attention_heads, config.head_dim
    hidden = base.embed_tokens(input_ids.flatten())
    turn = _turns(base, hidden, position_ids, heads, size)
    last = len(base.layers) - 1
    for number, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        queries, keys, values = _apply(
            _Project,
            hidden,
            layer.input_layernorm.weight,
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            turn,
            size,
            layer.input_layernorm.variance_epsilon,
        )
        mixed = _attention(queries, keys, values, mask, heads, attention.scaling)
        if number == last:
            mixed, hidden = mixed.index_select(0, wanted), hidden.index_select(0, wanted)
        hidden = torch.addmm(hidden, mixed, attention.o_proj.weight.t())
        hidden = _apply(
            _Mlp,
            hidden,
            layer.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
            layer.post_attention_layernorm.variance_epsilon,
        )
    final: Tensor = _apply(_Norm, hidden, base.norm.weight, base.norm.variance_epsilon)
    return final


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, scale: float) -> Tensor:
    """Masked attention within each row: [N, heads * size], N = rows * length, like each of the three inputs."""
    if mask.shape[-1] <= SHORT:
        found: Tensor = _apply(_Attend, queries, keys, values, mask, heads, scale)
        return found
    rows, length = mask.shape[0], mask.shape[-1]
    q, k, v = (x.view(rows, length, heads, -1).transpose(1, 2) for x in (queries, keys, values))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).reshape(rows * length, -1)


def _apply(function: Any, *arguments: Any) -> Any:
    """`function.apply`, which torch leaves untyped."""
    return function.apply(*arguments)


def _turns(base: Any, hidden: Tensor, position_ids: Tensor, heads: int, size: int) -> Tensor:
    """cos + i sin of every position's rotary angles, for q and k: complex [N, 2 * heads * size / 2]."""
    with torch.no_grad():
        positions = torch.arange(int(position_ids.max()) + 1)[None]
        cos, sin = base.rotary_emb(hidden, positions)
        table = torch.complex(cos[0, :, : size // 2], sin[0, :, : size // 2]).repeat(1, 2 * heads)
        return table.index_select(0, position_ids.flatten())


def _standardise(hidden: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Hidden states over their root mean square [N, d], and its inverse [N, 1]."""
    inverse = torch.linalg.vector_norm(hidden, dim=1, keepdim=True).square_().div_(hidden.shape[1])
    inverse.add_(epsilon).rsqrt_()
    return hidden * inverse, inverse


def _standardise_backward(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the hidden states; overwrites `gradient`, that of the standardised ones."""
    along = torch.linalg.vecdot(gradient, unit).unsqueeze(1).div_(-unit.shape[1])
    return gradient.addcmul_(unit, along).mul_(inverse)


def _paired(weight: Tensor, size: int) -> Tensor:
    """Rows of a q or k matrix so that the two numbers that a position turns together are neighbours."""
    out, width = weight.shape
    return weight.view(out // size, 2, size // 2, width).transpose(1, 2).reshape(out, width)


def _unpaired(weight: Tensor, size: int) -> Tensor:
    out, width = weight.shape
    return weight.view(out // size, size // 2, 2, width).transpose(1, 2).reshape(out, width)


class _Project(torch.autograd.Function):
    """Norm, then q, k and v [N, heads * size] each, with rotary positions. Head dimensions of q and k come out in
    paired order, which no score of attention can tell."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, turn: Tensor, size: int, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = q.shape[0]
        unit, inverse = _standardise(hidden, epsilon)
        joined = torch.cat([_paired(q, size), _paired(k, size), v])
        folded = joined * norm
        out = unit @ folded.t()
        torch.view_as_complex(out.view(len(out), -1, 2))[:, :width].mul_(turn)
        ctx.size = size
        ctx.save_for_backward(unit, inverse, norm, joined, folded, turn)
        return out[:, :width], out[:, width : 2 * width], out[:, 2 * width :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse, norm, joined, folded, turn = ctx.saved_tensors
        width = turn.shape[1]
        back = torch.cat(gradients, dim=1)
        torch.view_as_complex(back.view(len(back), -1, 2))[:, :width].mul_(turn.conj())
        weight, scale = _folded_backward(back.t() @ unit, joined, norm)
        q, k, v = torch.split(weight, width)
        hidden = _standardise_backward(back @ folded, unit, inverse)
        return hidden, scale, _unpaired(q, ctx.size), _unpaired(k, ctx.size), v, None, None, None


class _Attend(torch.autograd.Function):
    """Attention with the probabilities kept: for short rows quicker than the fused kernel, which forms them twice."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: int, scale: float
    ) -> Tensor:
        rows, length = mask.shape[0], mask.shape[-1]
        q, k, v = (_by_head(x, rows, heads) for x in (queries, keys, values))
        scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, length, length)
        shares = torch.add(mask, scores, alpha=scale).softmax(-1).view(rows * heads, length, length)
        ctx.heads, ctx.scale = heads, scale
        ctx.save_for_backward(q, k, v, shares)
        return _by_token(torch.bmm(shares, v), heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, shares = ctx.saved_tensors
        back = _by_head(gradients[0], len(shares) // ctx.heads, ctx.heads)
        inner = torch.ops.aten._softmax_backward_data(
            torch.bmm(back, v.transpose(1, 2)), shares, -1, shares.dtype
        ).mul_(ctx.scale)
        found = (torch.bmm(inner, k), torch.bmm(inner.transpose(1, 2), q), torch.bmm(shares.transpose(1, 2), back))
        return *(_by_token(x, ctx.heads) for x in found), None, None, None


def _by_head(tokens: Tensor, rows: int, heads: int) -> Tensor:
    """[rows * length, heads * size] -> [rows * heads, length, size]."""
    split = tokens.view(rows, len(tokens) // rows, heads, -1).transpose(1, 2)
    return split.reshape(rows * heads, split.shape[2], -1)


def _by_token(by_head: Tensor, heads: int) -> Tensor:
    """The inverse of `_by_head`."""
    count, length, size = by_head.shape
    return by_head.view(count // heads, heads, length, size).transpose(1, 2).reshape(-1, heads * size)


class _Mlp(torch.autograd.Function):
    """Norm, gated MLP, and the residual sum: [N, d] -> [N, d]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, epsilon: float
    ) -> Tensor:
        unit, inverse = _standardise(hidden, epsilon)
        joined = torch.cat([gate, up])
        folded = joined * norm
        opened = unit @ folded[: len(gate)].t()
        raised = unit @ folded[len(gate) :].t()
        open_ = F.silu(opened)
        out = torch.addmm(hidden, open_ * raised, down.t())
        ctx.save_for_backward(unit, inverse, norm, joined, folded, opened, raised, open_, down)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse, norm, joined, folded, opened, raised, open_, down = ctx.saved_tensors
        gradient = gradients[0]
        inner = gradient @ down
        down_gradient = gradient.t() @ (open_ * raised)
        both = torch.empty(len(inner), 2 * inner.shape[1])
        torch.mul(inner, open_, out=both[:, inner.shape[1] :])
        both[:, : inner.shape[1]] = torch.ops.aten.silu_backward(inner.mul_(raised), opened)
        weight, scale = _folded_backward(both.t() @ unit, joined, norm)
        gate, up = torch.split(weight, inner.shape[1])
        hidden = _standardise_backward(both @ folded, unit, inverse).add_(gradient)
        return hidden, scale, gate, up, down_gradient, None


class _Norm(torch.autograd.Function):
    """The last norm: [N, d] -> [N, d]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm: Tensor, epsilon: float) -> Tensor:
        unit, inverse = _standardise(hidden, epsilon)
        ctx.save_for_backward(unit, inverse, norm)
        return unit * norm

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse, norm = ctx.saved_tensors
        scale = (gradients[0] * unit).sum(0)
        return _standardise_backward(gradients[0] * norm, unit, inverse), scale, None


def _folded_backward(gradient: Tensor, joined: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a matrix and of the norm folded into its columns; `gradient` is that of the product."""
    return gradient * norm, (gradient * joined).sum(0)
