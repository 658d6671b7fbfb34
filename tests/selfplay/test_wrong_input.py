"""What a stranger may type, and what may lie on a disk: one sentence and an exit code, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from selfplay import cli
from selfplay.config import parse_config
from selfplay.errors import UserError, out_of_memory
from selfplay.rules import check_rules
from selfplay.run_folder import RunError, read_metrics
from tests.models import make_policy, save_model
from tests.selfplay.tiny_run import CONFIG
from tests.selfplay.trace_samples import small_run

Told = Callable[..., tuple[int, str]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Told:
    """Run a command in this process; its exit code and its one line on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["selfplay", *map(str, arguments)])
        capfd.readouterr()  # what making a model has to say
        with pytest.raises(SystemExit) as ended:
            cli.main()
        _, err = capfd.readouterr()
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert len(lines[0]) < 600
        return int(ended.value.code or 0), lines[0]

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG, encoding="utf-8")
    return file


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    small_run(tmp_path / "run")
    return next((tmp_path / "run").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("plan.device_memory_gib=.inf", "finite number"),
        ("engine.rows=8", "must be a multiple of 16, not 8"),
        ("cluster.worker_threads=1000000000000", "less than or equal to 1024"),
        ("model.dtype=float16", "training in float16 loses small gradients"),
        ("model.device=gpu", "no device 'gpu'"),
        ("model.device=cuda:x", "no device 'cuda:x'"),
        ("learn.optimizer.lr=.inf", "finite number"),
        ("seed=" + "9" * 5000, "not valid YAML"),
        ("seed=2026-13-45", "not valid YAML"),
        ("play.search.budget=8192", "cannot fit in engine.kv_slots (8192)"),
        ("engine.max_context=257", "the model reads at most 256 tokens"),
        ("model.lora.nosuch=1", "known keys: rank"),
        ("engine.server={url: u, model: m, reload: {nosuch: 1}}", "known keys: preset"),
        ("play.search.strategy.simulations=many", "simulations must be int, not 'many'"),
        ("play.search.strategy.c_init=.nan", "c_init must be float, not nan"),
        ("play.search.strategy.c_init=true", "c_init must be float, not True"),
        ("learn.objective={name: sft, value: x}", "value must be float, not 'x'"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_its_name(override: str, says: str, config: Path, told: Told) -> None:
    code, error = told("launch", config, "--dry-run", override)
    assert code == 2
    assert says in error


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("{model_type: llama, hidden_size: x}", "is no llama"),
        ("{model_type: llama, hidden_size: 0}", "can be planned"),
        ("{model_type: llama, num_attention_heads: 0}", "is no llama"),
        ("{model_type: vit}", "can be planned"),
    ],
)
def test_an_architecture_that_is_none_is_refused(architecture: str, says: str, config: Path, told: Told) -> None:
    code, error = told("launch", config, "--dry-run", "model.path=absent/model", f"plan.architecture={architecture}")
    assert code == 2
    assert says in error


def test_a_config_that_is_no_text_is_refused(tmp_path: Path, told: Told) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"seed: 0 # caf\xe9\n")
    code, error = told("launch", tmp_path / "latin.yaml", "--dry-run")
    assert code == 2
    assert "no UTF-8 text" in error


@pytest.mark.parametrize("command", [("inspect",), ("export", "--format", "sft", "--out", "out/a.jsonl")])
def test_what_is_no_shard_is_not_called_a_damaged_one(
    command: tuple[str, ...], config: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    for path, says in ((config, "is no shard"), (Path("/dev/null"), "is neither file nor folder")):
        code, error = told(command[0], path, *command[1:])
        assert code == 2
        assert says in error


@pytest.mark.parametrize("hurt", ["truncated", "flipped", "empty"])
@pytest.mark.parametrize("command", [("inspect",), ("export", "--format", "sft", "--out", "out/a.jsonl")])
def test_a_damaged_shard_is_named_and_nothing_is_written(
    command: tuple[str, ...], hurt: str, shard: Path, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = bytearray(shard.read_bytes())
    if hurt == "flipped":
        data[len(data) // 2] ^= 16
    shard.chmod(0o644)
    shard.write_bytes({"truncated": data[: len(data) // 2], "flipped": data, "empty": b""}[hurt])
    code, error = told(command[0], shard, *command[1:])
    assert code == 1
    assert f"{shard.name} is damaged" in error
    assert not (tmp_path / "out" / "a.jsonl").exists()


@pytest.mark.parametrize("form", ["sft", "preference", "stepwise", "prm", "prm-model"])
def test_an_export_of_a_run_that_is_not_there_is_wrong_input(form: str, tmp_path: Path, told: Told) -> None:
    code, error = told("export", tmp_path / "nowhere", "--format", form, "--out", tmp_path / "out" / "a.jsonl")
    assert code == 2
    assert "nowhere" in error
    assert not (tmp_path / "out").exists()


def test_an_export_below_a_file_is_refused(shard: Path, config: Path, told: Told) -> None:
    code, error = told("export", shard, "--format", "sft", "--out", config / "deeper" / "a.jsonl")
    assert code == 2
    assert "tiny.yaml is no folder" in error


def test_no_rows_to_grade_and_a_verifier_that_is_none_are_refused(tmp_path: Path, told: Told) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n", encoding="utf-8")
    assert "holds no rows" in told("grade", file, "--verifier", "number")[1]
    file.write_text('{"gold": "1", "prediction": "1"}\n', encoding="utf-8")
    for name in ("collections.OrderedDict", "builtins.dict", "mcts.types.Problem"):
        code, error = told("grade", file, "--verifier", name)
        assert code == 2
        assert re.search("is no verifier|needs the setting", error)


@pytest.mark.parametrize("command", ["solve", "evaluate"])
def test_a_model_folder_that_is_none_is_refused(command: str, tmp_path: Path, told: Told) -> None:
    """2 where it is the wrong folder, 1 where what lies in it is damaged."""
    good = save_model(tmp_path / "good")
    folder = good / "policy" if (good / "policy").is_dir() else good
    question = ("3 7 12 -> 33",) if command == "solve" else ()

    def refusal(path: Path) -> tuple[int, str]:
        return told(command, path, *question, "--task", "countdown:numbers=3", "--budget", 30)

    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for file in bare.glob("*token*"):
        file.unlink()
    assert refusal(bare)[0] == 2
    assert "has no tokenizer" in refusal(bare)[1]
    (bare / "config.json").write_text("{", encoding="utf-8")
    code, error = refusal(bare)
    assert code == 2
    assert "no model's config.json" in error
    code, error = refusal(bare / "config.json")
    assert code == 2
    assert "is no folder" in error

    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = next(cut.glob("model*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    code, error = refusal(cut)
    assert code == 1
    assert "are damaged" in error

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    facts = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**facts, "vocab_size": facts["vocab_size"] + 1}), encoding="utf-8")
    code, error = refusal(other)
    assert code == 2
    assert "not those of its config.json, which asks for other shapes" in error


def test_a_damaged_value_head_is_named(tmp_path: Path, told: Told) -> None:
    from mcts.engines.model import save_policy

    save_policy(make_policy(), tmp_path / "model")
    head = tmp_path / "model" / "value_head.safetensors"
    head.write_bytes(head.read_bytes()[:40])
    code, error = told("solve", tmp_path / "model" / "policy", "3 7 12 -> 33", "--task", "countdown:numbers=3")
    assert code == 1
    assert "value_head.safetensors" in error


def test_a_checkpoint_out_of_its_place_is_said(tmp_path: Path, told: Told) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    for place in (tmp_path / "alone" / "b" / "00003", tmp_path / "checkpoints" / "best"):
        place.mkdir(parents=True)
        (place / "state.json").write_text("{}", encoding="utf-8")
        code, error = told("evaluate", place)
        assert code == 2
        assert "out of its place" in error


@pytest.mark.parametrize(
    "row", ["[" * 100_000, '{"id": 1, "prompt": ' + "9" * 5000 + "}", '{"id": 1, "prompt": "3", "meta": 4}']
)
def test_a_problem_that_is_none_is_named_by_its_row(row: str, tmp_path: Path, told: Told) -> None:
    save_model(tmp_path / "model")
    file = tmp_path / "problems.jsonl"
    file.write_text(row + "\n", encoding="utf-8")
    code, error = told("evaluate", tmp_path / "model", "--task", "countdown:numbers=3", "--problems", file)
    assert code == 2
    assert "row 1" in error


@pytest.mark.parametrize("problem", ["", "nonsense", "3 7 -> 33", "\x00"])
def test_a_problem_typed_wrongly_is_the_users_to_mend(problem: str, tmp_path: Path, told: Told) -> None:
    save_model(tmp_path / "model")
    code, error = told("solve", tmp_path / "model", problem, "--task", "countdown:numbers=3")
    assert code == 2
    assert 'like "1 2 3 -> ' in error


def test_figures_that_could_not_be_written_are_refused_before_the_work(tmp_path: Path, told: Told) -> None:
    for target in (tmp_path, tmp_path / "absent" / "figures.json"):
        code, error = told("evaluate", "absent/model", "--json", target)
        assert code == 2
        assert f"cannot write {target}" in error


def test_a_runs_own_files_that_are_damaged_are_named(tmp_path: Path, told: Told) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    for text in ("", "[1]", "{}"):
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
        code, error = told("resume", tmp_path)
        assert code == 1
        assert "run.json is damaged" in error
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0', encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
        read_metrics(tmp_path)


def test_a_seed_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for command in (["solve", "absent", "1 2 3 -> 4"], ["evaluate", "absent"]):
        for seed in ("-1", str(1 << 64)):
            monkeypatch.setattr("sys.argv", ["selfplay", *command, "--seed", seed])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 2
            assert "'--seed'" in capfd.readouterr().err


def test_a_cluster_that_is_not_there_is_said_at_once_and_leaves_no_run(tmp_path: Path, told: Told) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    joining = ("cluster.executor=ray", "--address", "127.0.0.1:1")
    for _ in range(2):  # the same command can be given again
        code, error = told("launch", tmp_path / "tiny.yaml", *joining, "--run-dir", tmp_path / "run")
        assert code == 1
        assert "nothing answers at 127.0.0.1:1 " in error
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here_is_told_before_anything_is_written(told: Told, config: Path, tmp_path: Path) -> None:
    code, line = told("launch", config, "--run-dir", tmp_path / "r", "model.device=cuda", "cluster.executor=inline")
    assert code == 2
    assert "there is no GPU here: use device: cpu" in line
    assert not (tmp_path / "r").exists()


def test_a_context_that_a_fresh_model_cannot_read_leaves_no_run(told: Told, config: Path, tmp_path: Path) -> None:
    code, line = told("launch", config, "--run-dir", tmp_path / "r", "engine.max_context=257")
    assert code == 2
    assert "lower it, or raise model.fresh.max_positions" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("split", ["heldout", "dev"])
def test_a_run_without_problems_to_evaluate_on_is_refused(split: str, told: Told, config: Path, tmp_path: Path) -> None:
    code, line = told("launch", config, "--run-dir", tmp_path / "r", f"task.{split}_sets=0")
    assert code == 2
    assert f"no {split} problem" in line
    assert not (tmp_path / "r").exists()


def test_no_memory_left_is_said_in_one_sentence(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["selfplay", "launch", str(config), "--run-dir", str(tmp_path / "r"), f"model.value_width={10**12}"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    *_, line = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"error: out of memory \(\d+ bytes more were needed\): lower engine.kv_slots, .*", line)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB more"),
        (MemoryError("Unable to allocate 3.6 TiB for an array with shape (9,)"), "3.6 TiB more"),
        (MemoryError(), "out of memory: lower"),
        (RuntimeError("shape mismatch"), ""),
    ],
)
def test_how_much_memory_was_lacking_is_said_where_it_is_known(error: Exception, says: str) -> None:
    assert says in out_of_memory(error)
    assert bool(says) == bool(out_of_memory(error))


def test_a_model_that_cannot_be_served_is_told_before_anything_is_written(
    told: Told, config: Path, tmp_path: Path
) -> None:
    from transformers import MistralConfig

    save_model(tmp_path / "model")
    folder = tmp_path / "model" / "policy"
    MistralConfig(max_position_embeddings=512, sliding_window=16, hidden_size=32).save_pretrained(folder)
    for how in (("--run-dir", tmp_path / "run"), ("--dry-run",)):
        code, line = told("launch", config, *how, f"model.path={folder}")
        assert code == 2
        assert "sliding window of 16 tokens" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["inspect", "status", "doctor", "resume", "reanalyse"])
def test_a_run_that_is_not_there_is_wrong_input(command: str, config: Path, tmp_path: Path, told: Told) -> None:
    for path in (tmp_path / "nowhere", config):
        code, error = told(command, path)
        assert code == 2
        assert str(path) in error


@pytest.mark.parametrize("override", ["engine.rows=20", "model.dtype=float16", "play.search.budget=8192"])
def test_the_config_of_a_run_that_began_before_a_rule_can_still_be_read(override: str) -> None:
    read = parse_config(CONFIG, [override])
    with pytest.raises(UserError):
        check_rules(read)
