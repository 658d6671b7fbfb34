"""The plan of a run against the bytes of the real thing, and against runs that cannot fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcts.engines.torch_engine import TorchEngine
from mcts.tasks.countdown import Countdown
from selfplay import cli
from selfplay.config import Config, load_config, parse_config
from selfplay.errors import SettingError
from selfplay.plan import GIB, PlanError, make_plan
from selfplay.plan_model import activation_bytes, lora_parameters, meta_model, optimizer_bytes, shape_of
from tests.models import FAMILIES, make_policy, save_model
from tests.selfplay.tiny_run import CONFIG

CONFIGS = Path(__file__).parents[2] / "configs"


def config(*overrides: str) -> Config:
    return parse_config(CONFIG, ["plan.device_memory_gib=8", *overrides])


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_weights_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    policy = make_policy(family)
    policy.model.save_pretrained(tmp_path)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        shape = shape_of(config(f"model.path={tmp_path}", f"model.dtype={dtype}"))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
        assert shape.parameters == sum(p.numel() for p in loaded.parameters())
        assert shape.weights == bytes_of(loaded.parameters()) == size * shape.parameters
    assert policy.head is not None
    assert shape.head_parameters == sum(p.numel() for p in policy.head.parameters())


def test_a_public_architecture_has_its_public_number_of_parameters() -> None:
    """Qwen2.5-1.5B: 1,543,714,304, as its safetensors index states; built in no memory."""
    assert make_plan(load_config(CONFIGS / "gsm8k_qwen2.5-1.5b.yaml")).shape.parameters == 1_543_714_304
    assert make_plan(load_config(CONFIGS / "math_qwen2.5-7b_lora.yaml")).shape.parameters == 7_615_616_512


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_those_that_the_engine_allocates(tmp_path: Path, family: str) -> None:
    policy = make_policy(family)
    policy.model.save_pretrained(tmp_path)
    settings = config(f"model.path={tmp_path}", "engine.rows=32", "engine.kv_slots=1000", "engine.max_context=200")
    engine = TorchEngine(policy, delimiter=";", rows=32, kv_slots=1000, context=200)
    forward = engine.batch._forward
    forward.fit(200)
    worker = make_plan(settings).loads[1]
    assert worker.parts["KV cache, tree"] == bytes_of([forward.arena])
    assert worker.parts["KV cache, rows"] == bytes_of([forward.cache.kv])
    forward.fit(1)
    assert worker.parts["KV cache, rows"] >= bytes_of([forward.cache.kv])


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_a_real_forward_keeps_for_its_backward(family: str) -> None:
    """All that autograd saves in a forward under a tree mask on the CPU; the mask is counted apart."""
    model = make_policy(family, width=64).model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens, kept, alive = 96, {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.zeros(1, 1, tokens, tokens)
    positions = torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(positions % 90, attention_mask=mask, position_ids=positions, use_cache=False)
    real = (sum(kept.values()) - bytes_of([mask])) / tokens
    planned = activation_bytes(meta_model(model.config, "float32"))
    assert planned == pytest.approx(real, rel=0.03)


def test_adapters_are_two_thin_matrices_per_target_in_float32() -> None:
    """Width 32, 4 heads of 8, 2 KV heads, two layers: q is 32 x 32, v is 16 x 32."""
    model = make_policy("llama").model
    found = lora_parameters(model, 4, ["q_proj", "v_proj"])
    assert sum(p.numel() for p in found) == 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)
    every = lora_parameters(model, 4, "all-linear")
    assert len(every) == 2 * 2 * 7, "seven matrices a layer, none of the output layer"
    assert optimizer_bytes([], found) == 2 * 4 * sum(p.numel() for p in found) + 4 * len(found)
    with pytest.raises(PlanError, match="check their names"):
        lora_parameters(model, 4, ["c_attn"])


def test_adapters_leave_the_trunk_without_gradient_and_optimizer() -> None:
    facts = "{model_type: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 50}"
    given = ("model.path=absent/model", f"plan.architecture={facts}")
    before, after = shape_of(config(*given)), shape_of(config(*given, "model.lora={rank: 2, alpha: 4}"))
    assert after.weights == before.weights
    assert after.gradients == after.adapters + 4 * after.head_parameters
    assert after.optimizer < before.optimizer


def test_a_frozen_trunk_leaves_the_value_head_to_train() -> None:
    whole = config()
    model = whole.model.model_copy(update={"freeze_trunk": True})
    shape = shape_of(whole.model_copy(update={"model": model}))
    assert shape.trainable == 0
    assert shape.gradients == 4 * shape.head_parameters
    assert shape.optimizer == 2 * 4 * shape.head_parameters + 4 * 4, "four tensors, a step count each"


def test_gradient_checkpointing_keeps_a_layer_and_the_inputs_of_all() -> None:
    whole = config("model.fresh={width: 32, layers: 8, heads: 2}")
    model = whole.model.model_copy(update={"gradient_checkpointing": True})
    less = make_plan(whole.model_copy(update={"model": model})).loads[0].parts["activations"]
    shape, tokens = shape_of(whole), whole.learn.batch_tokens
    saved = make_plan(whole).loads[0].parts["activations"] - less
    assert saved == tokens * (shape.activation - shape.activation // 8 - 8 * 32 * 4)


def test_a_device_holds_what_it_shares_and_no_more() -> None:
    one = make_plan(config("cluster.executor=ray", "cluster.workers=3"))
    learner, worker = one.loads
    assert one.devices == (("learner and 3 workers", learner.total + 3 * worker.total),)
    three = make_plan(config("cluster.executor=ray", "cluster.workers=3", "plan.devices=3"))
    assert three.devices == (("learner", learner.total), ("2 workers", 2 * worker.total))
    inline = make_plan(config("cluster.workers=3"))
    assert inline.devices[0][0] == "learner and 1 worker"


SERVER = "engine.server={url: 'http://127.0.0.1:1', model: m, value: VALUE}"


def test_a_served_engine_leaves_its_weights_and_caches_to_the_server() -> None:
    whole, given = config(), ("engine.kind=server", "engine.kv_slots=100000000")
    served = make_plan(config(*given, SERVER.replace("VALUE", "none")))
    assert served.loads[1].parts == {}
    assert served.devices[0][1] == served.loads[0].total == make_plan(whole).loads[0].total
    assert served.kv_token == 0
    assert served.refusal is None, "the server's slots take nothing here"
    assert any("the server's" in line for line in served.lines())


def test_a_value_head_beside_a_server_reads_its_policy_and_one_sequence() -> None:
    given = ("engine.kind=server", "engine.max_context=200", SERVER.replace("VALUE", "local"))
    shape = shape_of(config())
    for override, size in (("model.dtype=float32", 4), ("model.dtype=bfloat16", 2)):
        parts = make_plan(config(*given, override)).loads[1].parts
        assert parts["weights"] == size * shape.parameters + 4 * shape.head_parameters
        assert set(parts) == {"weights", "one sequence"}
    twice = make_plan(config(*given[:1], "engine.max_context=100", given[2])).loads[1].parts
    assert make_plan(config(*given)).loads[1].parts["one sequence"] == 2 * twice["one sequence"]


def test_a_reference_model_and_side_by_side_batches_are_counted() -> None:
    plain = make_plan(config()).loads[0].parts
    assert "reference" not in plain
    kl = make_plan(config("learn.objective.name=alphazero", "learn.objective.kl=0.1")).loads[0].parts
    assert kl["reference"] == kl["weights"] - 4 * make_plan(config()).shape.head_parameters
    twice = make_plan(config("cluster.learner_threads=2")).loads[0].parts
    assert twice["activations"] == 2 * plain["activations"]


def test_searches_tokens_hours_and_cost_follow_from_the_config() -> None:
    """Prompts of 20 and budgets of 96: 116 slots of 8,192. 24 x 96 sampled at 10/s, 4 x 16 x 116 trained at 100/s."""
    plan = make_plan(
        config(
            "plan.prompt_tokens=20", "plan.play_tokens_per_second=10", "plan.learn_tokens_per_second=100",
            "plan.price_per_hour=3.6", "play.open_searches=1000",
        )
    )  # fmt: skip
    assert plan.in_flight == 8192 // 116 == 70
    assert plan.tokens == {"sampled": 2304, "prompt": 480, "trained": 7424}
    assert plan.hours == pytest.approx((230.4 + 74.24) / 3600)
    assert plan.cost == pytest.approx(3.6 * (230.4 + 74.24) / 3600)
    assert any("unmeasured" in line for line in plan.lines())
    assert make_plan(config("plan.play_tokens_per_second=10")).hours is None, "half the speeds give no time"
    assert make_plan(config("play.open_searches=5")).in_flight == 5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["plan.device_memory_gib=0.001"], "to use"),
        (["engine.kv_slots=100000000"], "lower engine.kv_slots"),
        (["engine.kv_slots=100"], "a search may need 128 KV slots and a worker has 100"),
        (["learn.batch_tokens=100000000"], "lower learn.batch_tokens"),
        (["engine.max_context=512"], "reads at most 256 tokens"),
        (["plan.prompt_tokens=64"], "leaves no room in a context of 64"),
    ],
)
def test_what_cannot_fit_is_refused_in_one_sentence_that_says_what_to_change(
    overrides: list[str], sentence: str
) -> None:
    refusal = make_plan(config(*overrides)).refusal
    assert refusal is not None
    assert sentence in refusal


def test_a_device_is_full_at_its_usable_memory_and_not_before() -> None:
    need = make_plan(config()).devices[0][1]
    assert make_plan(config(f"plan.device_memory_gib={(need + 1024) / 0.9 / GIB}")).refusal is None
    assert make_plan(config(f"plan.device_memory_gib={(need - 1024) / 0.9 / GIB}")).refusal is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=absent/model"], "state plan.architecture"),
        (["model.path=absent/model", "plan.architecture={hidden_size: 8}"], "names no model_type"),
        (["model.path=absent/model", "plan.architecture={model_type: nonesuch}"], "knows no model_type"),
        (["model.path=absent/model", "plan.architecture=absent/too"], "cannot read"),
        (["model.device=cuda:99", "plan.device_memory_gib=null"], "state plan.device_memory_gib"),
    ],
)
def test_what_cannot_be_known_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(config(*overrides))


def test_a_part_that_does_not_exist_is_found_before_anything_else() -> None:
    with pytest.raises(SettingError, match="nonesuch"):
        make_plan(config("learn.objective.name=nonesuch"))
    with pytest.raises(SettingError, match="nonesuch"):
        make_plan(config("play.search.strategy.name=nonesuch"))
    with pytest.raises(SettingError, match="no task 'nonesuch'"):
        make_plan(config("task.name=nonesuch"))
    with pytest.raises(SettingError, match="no setting 'number': did you mean 'numbers'"):
        make_plan(config("task.number=3"))


def test_a_wrong_setting_of_a_task_is_found_before_its_files_and_model_are_there() -> None:
    file = CONFIGS / "own_problems.yaml"
    make_plan(load_config(file, ["task.path=not/yet/here.jsonl"]))
    with pytest.raises(SettingError, match="delimeter"):
        make_plan(load_config(file, ["task.path=not/yet/here.jsonl", "task.delimeter=x"]))


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("gsm8k_vllm", ["task.path=absent"], ["absent"]),
        ("math_qwen2.5-7b_lora", ["task.train=absent/a.jsonl", "task.heldout={file}"], ["absent/a.jsonl"]),
        ("own_problems", ["task.path={file}"], []),
        ("arc_program", ["task.path=absent", "task.heldout_path=absent/b"], ["absent", "absent/b"]),
        ("game24", ["task.path=absent.csv"], ["absent.csv"]),
        ("game24", [], []),
        ("countdown3", [], []),
    ],
)
def test_files_of_the_task_that_are_not_here_are_named_and_refuse_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: list[str], missing: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "here.jsonl"
    file.write_text("")
    plan = make_plan(load_config(CONFIGS / f"{name}.yaml", [text.format(file=file) for text in given]))
    told = [text for text in plan.warnings if text.startswith("the task's ")]
    assert told == [
        f"the task's {path} is not here (looked for from {tmp_path}): a launch reads it where it starts"
        for path in missing
    ]
    assert [f"warning: {text}" for text in plan.warnings] == plan.lines()[len(plan.lines()) - len(plan.warnings) :]
    assert plan.data()["warnings"] == list(plan.warnings)
    assert plan.refusal is None


def test_a_task_of_ones_own_may_say_which_files_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Countdown, "files", ["absent"], raising=False)
    assert len(make_plan(config()).warnings) == 1
    monkeypatch.setattr(Countdown, "files", "absent")  # something else of that name
    assert make_plan(config()).warnings == ()


def test_sizes_that_are_not_the_models_own_are_said_to_be_stated(tmp_path: Path) -> None:
    stated = "plan.architecture={model_type: llama, hidden_size: 32, num_attention_heads: 2, vocab_size: 50}"
    warnings = make_plan(config("model.path=absent/model", stated)).warnings
    assert warnings == ("the model absent/model is not here: its sizes are those that plan.architecture states",)
    save_model(tmp_path)
    assert make_plan(config(f"model.path={tmp_path}", stated)).warnings == ()


def test_a_model_is_found_by_its_name_in_the_cache_and_by_an_adapter_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--tiny"
    policy = make_policy()
    policy.model.save_pretrained(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (tmp_path / "run" / "policy").mkdir(parents=True)
    (tmp_path / "run" / "policy" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/tiny"}')
    for path in ("someone/tiny", str(tmp_path / "run"), str(tmp_path / "run" / "policy")):
        assert make_plan(config(f"model.path={path}")).shape.parameters == policy.model.num_parameters(), path
    for facts in ("{", "{}", "[]", '{"base_model_name_or_path": "someone/absent"}'):
        (tmp_path / "run" / "policy" / "adapter_config.json").write_text(facts)
        with pytest.raises(PlanError, match="is not here; get it"):
            make_plan(config(f"model.path={tmp_path / 'run'}"))


def test_the_plan_changes_neither_traces_nor_weights() -> None:
    assert config("plan.prompt_tokens=7").hash() == config().hash()


def test_the_command_loads_nothing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["selfplay", "launch", "tiny.yaml", "--dry-run", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    code, out, _ = run("--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["parameters"] > 10_000
    assert facts["refusal"] is None
    code, out, _ = run()
    assert code == 0
    assert f"{facts['parameters']:,} parameters" in out
    code, out, err = run("--json", "plan.device_memory_gib=0.001")
    assert code == 2
    assert json.loads(out)["refusal"] in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml"], "no run folder"


STATED = ["arc_program", "gsm8k_qwen2.5-1.5b", "gsm8k_vllm", "math_qwen2.5-7b_lora", "own_problems"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_plan_and_fits(path: Path) -> None:
    plan = make_plan(load_config(path, ["plan.device_memory_gib=8"] if path.stem not in STATED else []))
    assert plan.refusal is None
    assert not plan.measured


@pytest.mark.parametrize("name", STATED)
def test_the_comment_of_a_config_states_the_plan_that_is_computed_for_it(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    plan = make_plan(load_config(path))
    assert plan.refusal is None
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    learner, worker = plan.loads
    assert plan.hours is not None
    assert plan.cost is not None
    for part in (
        f"{plan.shape.parameters:,} parameters",
        f"{plan.devices[0][1] / GIB:.1f} GiB of {plan.usable / GIB:.1f} usable",
        f"learner {learner.total / GIB:.1f}",
        f"worker {worker.total / GIB:.1f}",
        f"{plan.in_flight} searches in flight",
        f"{plan.tokens['sampled']:,} tokens sampled",
        f"{plan.hours:.2f} h",
        f"{plan.cost:.2f} dollars",
        "Unmeasured",
    ):
        assert part in comment, part
