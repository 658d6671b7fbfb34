"""The value head as a process reward model that `AutoModelForTokenClassification.from_pretrained` loads.

The folder holds the policy's trunk and a head of one output; the sigmoid of its logit at a step's last token is the
value. Three ways:

- a linear value head (`model.value_width: 0`) is the linear layer of the architecture's stock class: exact;
- one with a hidden layer has no stock class, so a small model file goes into the folder, which loads it with
  `trust_remote_code=True` and refuses to load without: exact;
- where stock classes are needed (trainers, servers), `approximate` fits a linear layer to such a head on the states of
  the run's own traces, and measures what that costs on problems left out of the fit.

What was written is loaded and compared with ours before the folder gets its name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from mcts.engines.model import Policy, load_policy
from mcts.engines.value_head import ValueHead
from mcts.tree import Tree
from selfplay import prm_model
from selfplay.errors import UserError
from selfplay.shards import iter_traces, list_shards
from selfplay.source import find_source

HEADS: Final = ("score", "classifier")
"""Names that transformers' token-classification models give their linear layer."""
STATES: Final = 8192
"""Most states that a head is fitted to and measured on."""
TOLERANCE: Final = 1e-5
"""Largest difference in value, in float32, between an exact export and our head."""
_BATCH: Final = 32
_RIDGE: Final = 1e-4


class PrmError(UserError):
    """A value head that cannot be exported; the message is one sentence that says what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Hidden states at the ends of steps, from the run's traces; K of them."""

    hidden: Tensor  # [K, d] float32
    held_out: Tensor  # [K] bool: its problem is left out of the fit


def export_prm(path: Path, out: Path, *, approximate: bool = False) -> dict[str, Any]:
    """Write the value head of a run's last checkpoint, or of a checkpoint, as the folder `out`; what was done.

    `approximate`: fit a linear head to one with a hidden layer, so that stock classes load the folder. Raises PrmError:
    no value head, `out` exists, too few traces for the fit, an architecture without token classification.
    """
    if out.exists():
        raise PrmError(f"{out} exists already; move it away or choose another --out")
    if path.is_dir() and not any((path / name).exists() for name in ("run.json", "state.json")):
        raise PrmError(f"{path} is no run and no checkpoint of one; give one of these, for its value head")
    source = find_source(str(path))
    policy = load_policy(source.policy, head=source.value_head)
    head = policy.head
    if head is None:
        raise PrmError(f"{path} has no value head to export; give a run or checkpoint of selfplay")
    facts: dict[str, Any] = {"format": "prm-model", "policy_version": source.version}
    linear: nn.Linear | None = None
    if head.width == 0:
        linear = head.outer
    elif approximate:
        states = collect_states(policy, path)
        logits = head.logits(states.hidden).detach()
        linear = fit_linear(logits, states)
        facts |= measure(logits, linear(states.hidden).detach()[:, 0], states)
    facts["exact"] = head.width == 0 or linear is None
    facts["loads_with"] = "trust_remote_code" if linear is None else "stock classes"
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        if linear is None:
            write_own(policy, head, building)
        else:
            write_stock(policy, linear, building)
        facts["written_error"] = compare(policy, head.logits if linear is None else linear, building)
        if facts["written_error"] > TOLERANCE:
            raise PrmError(
                f"the written model differs from the value head by {facts['written_error']:.2g}; its architecture is "
                "not one that this export can hold"
            )
        (building / "README.md").write_text(_card(facts), encoding="utf-8")
        (building / "export.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        building.rename(out)
    except OSError as error:
        raise PrmError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return facts


def write_own(policy: Policy, head: ValueHead, folder: Path) -> None:
    """Write the policy's trunk with its own head, the file that `prm_model` is, and the tokenizer."""
    trunk = policy.model.base_model
    described = {key: value for key, value in trunk.config.to_dict().items() if key != "_name_or_path"}
    config = prm_model.ValuePrmConfig(trunk=described, value_width=head.width, dtype=policy.model.dtype, num_labels=1)
    config.id2label, config.label2id = {0: "value"}, {"value": 0}
    model = prm_model.ValuePrm(config).to(policy.model.dtype)
    model.model.load_state_dict(trunk.state_dict())
    model.score[0].load_state_dict(head.inner.state_dict())
    model.score[2].load_state_dict(head.outer.state_dict())
    module = Path(prm_model.__file__).stem
    model.config.auto_map = {
        "AutoConfig": f"{module}.ValuePrmConfig",
        "AutoModelForTokenClassification": f"{module}.ValuePrm",
    }
    model.save_pretrained(folder)
    shutil.copyfile(prm_model.__file__, folder / f"{module}.py")
    policy.tokenizer.save_pretrained(folder)


def write_stock(policy: Policy, linear: nn.Linear, folder: Path) -> None:
    """Write the policy's trunk with `linear` [1, d] as its token-classification head, and the tokenizer. Raises
    PrmError where transformers has no such model for the architecture."""
    from transformers import AutoModelForTokenClassification

    model = policy.model
    config = type(model.config).from_dict({**model.config.to_dict(), "architectures": None})
    config.num_labels = 1
    config.id2label, config.label2id = {0: "value"}, {"value": 0}
    try:
        target = AutoModelForTokenClassification.from_config(config, dtype=model.dtype)
    except ValueError as error:
        raise PrmError(f"transformers has no token-classification model for {config.model_type}") from error
    names = [name for name in HEADS if isinstance(getattr(target, name, None), nn.Linear)]
    if not names:
        raise PrmError(f"the token-classification model of {config.model_type} has no linear head named score")
    target.base_model.load_state_dict(model.base_model.state_dict())
    layer = getattr(target, names[0])
    with torch.no_grad():
        layer.weight.copy_(linear.weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(1, dtype=model.dtype))
        layer.bias.copy_(linear.bias)
    target.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


@torch.inference_mode()
def compare(policy: Policy, head: Callable[[Tensor], Tensor], folder: Path) -> float:
    """Largest difference in value between the model in `folder` and `head` on the policy, on random tokens."""
    from transformers import AutoModelForTokenClassification

    own = (folder / Path(prm_model.__file__).name).exists()  # its code is ours: no need to run the copy
    loader = prm_model.ValuePrm if own else AutoModelForTokenClassification
    model = loader.from_pretrained(folder, local_files_only=True).eval()
    tokens = torch.randint(policy.model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    theirs = model(input_ids=tokens).logits[..., 0]
    ours = head(policy.hidden(tokens)).reshape(theirs.shape)
    return float((torch.sigmoid(theirs.float()) - torch.sigmoid(ours.float())).abs().max())


@torch.no_grad()
def collect_states(policy: Policy, path: Path, limit: int = STATES) -> States:
    """Hidden states at the prompts' and steps' last tokens of the newest traces of the run around `path`, at most
    `limit`. Raises PrmError where there are no traces on both sides of the split."""
    run = path if (path / "run.json").exists() else path.absolute().parent.parent
    hidden: list[Tensor] = []
    held_out: list[bool] = []
    for shard in reversed(list_shards(run)):
        for trace in iter_traces(shard, columns=["problem_id", "nodes"]):
            # by the problem, so that no state of the fit shares a prompt with one it is measured on
            out = hashlib.sha256(trace.problem_id.encode()).digest()[0] % 2 == 1
            for nodes, states in _tree_states(policy, trace.tree):
                hidden.append(states)
                held_out += [out] * len(nodes)
        if len(held_out) >= limit:
            break
    if len(set(held_out)) < 2:
        raise PrmError(f"{run} has too few traces to fit a linear head and measure it; play an iteration first")
    joined = torch.cat(hidden)[:limit].float()
    return States(joined, torch.tensor(held_out[:limit]))


def _tree_states(policy: Policy, tree: Tree) -> Iterator[tuple[list[int], Tensor]]:
    """Nodes and their states [n, d], each node once. A step that EOS ended has none: nothing reads a value there."""
    done: set[int] = set()
    chains: list[list[int]] = []
    for node in range(len(tree) - 1, -1, -1):
        if node not in done and not tree.terminal[node]:
            chains.append([n for n in tree.path(node) if n not in done])
            done.update(chains[-1])
    for start in range(0, len(chains), _BATCH):
        some = chains[start : start + _BATCH]
        rows = [_tokens(tree, chain[-1]) for chain in some]
        width = max(map(len, rows))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=policy.device)
        states = policy.hidden(padded, use_cache=False)  # padding on the right is seen by no token before it
        for chain, row in zip(some, states, strict=True):
            yield chain, row[[len(_tokens(tree, n)) - 1 for n in chain]].cpu()


def _tokens(tree: Tree, node: int) -> list[int]:
    ids: list[int] = tree.prompt_ids.tolist()
    for n in tree.path(node):
        step = tree.steps[n]
        ids += step.token_ids.tolist() if step is not None else []
    return ids


def fit_linear(logits: Tensor, states: States) -> nn.Linear:
    """The linear head whose sigmoid has the least cross-entropy against the head's values, with a small ridge on
    standardised states; `logits` [K] are the head's. Fitted to the states that are not held out."""
    inside = ~states.held_out
    x, target = states.hidden[inside].double(), torch.sigmoid(logits[inside]).double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    z = (x - mean) / scale
    weight = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = nn.functional.binary_cross_entropy_with_logits(z @ weight + bias, target)
        total = entropy + _RIDGE * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    linear = nn.Linear(z.shape[1], 1)
    with torch.no_grad():
        slope = weight / scale
        linear.weight.copy_(slope[None])
        linear.bias.copy_((bias - slope @ mean)[None])
    return linear


def measure(ours: Tensor, linear: Tensor, states: States) -> dict[str, Any]:
    """What a linear head costs on the held-out states; logits [K] of both."""
    outside = states.held_out
    values = torch.stack([torch.sigmoid(ours), torch.sigmoid(linear)])[:, outside].double()
    gap = (values[0] - values[1]).abs()
    return {
        "fitted_states": int((~outside).sum()),
        "held_out_states": int(outside.sum()),
        "mean_error": float(gap.mean()),
        "p95_error": float(gap.quantile(0.95)),
        "max_error": float(gap.max()),
        "correlation": float(torch.corrcoef(values)[0, 1]),
    }


def _card(facts: dict[str, Any]) -> str:
    stock = facts["loads_with"] == "stock classes"
    trust = "" if stock else ", trust_remote_code=True"
    lines: Sequence[str] = [
        "---",
        "pipeline_tag: token-classification",
        "library_name: transformers",
        "tags: [selfplay, prm, process-reward-model, trl]",
        "---",
        "# Process reward model",
        "",
        "The trunk of a policy trained by mcts-selfplay with its value head as a head of one output. The "
        "sigmoid of the logit at the last token of a prompt or step is the chance that the episode is won from there:",
        "",
        "```python",
        f"model = AutoModelForTokenClassification.from_pretrained(folder{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        'input_ids = tokenizer(prompt_and_steps, return_tensors="pt").input_ids',
        "value = model(input_ids).logits[0, -1, 0].sigmoid()",
        "```",
        "",
        f"Policy version {facts['policy_version']}. The written model was loaded and compared with the head it was "
        f"given: largest difference in value {facts['written_error']:.1g}.",
        "",
    ]
    if facts["exact"]:
        return "\n".join([*lines, "This is the trained head itself.", ""])
    rows = ["fitted_states", "held_out_states", "mean_error", "p95_error", "max_error", "correlation"]
    return "\n".join(
        [
            *lines,
            "**An approximation.** The trained head has a hidden layer, for which token classification has no room. "
            "This linear head was fitted to its values on half of the run's problems; on the other half, in value:",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {facts[name]:.4g} |" for name in rows),
            "",
        ]
    )
