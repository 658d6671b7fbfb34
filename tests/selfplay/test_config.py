"""The config refuses what it does not know, in one sentence that names the nearest key."""

from pathlib import Path

import pytest

from selfplay.config import ConfigError, load_config, parse_config

MINIMAL = "task: {name: countdown}\nplay: {search: {strategy: {name: mcts}, budget: 64}}"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_loads(path: Path) -> None:
    assert load_config(path).iterations >= 1


def test_there_are_config_files() -> None:
    assert CONFIGS


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sead=1", "unknown key sead; did you mean seed?"),
        ("play.problms=3", "unknown key play.problms; did you mean problems?"),
        ("learn.optimizer.momentum=1", "unknown key learn.optimizer.momentum"),
        ("play.search.budget=0", "play.search.budget: Input should be greater than 0"),
        ("cluster.workers=-1", "cluster.workers: Input should be greater than 0 (got -1)"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed", "must have the form key.path=value"),
        ("seed.x=1", "seed: Input should be a valid integer"),
        ("learn.optimizer.name=sgd", "learn.optimizer.name: Input should be 'adamw' or 'muon'"),
    ],
)
def test_a_wrong_override_is_one_clear_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(MINIMAL, [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rule_about_a_whole_section_does_not_print_the_section() -> None:
    with pytest.raises(ConfigError, match=r"^config: cluster: executor: inline is one process: .* set executor: ray$"):
        parse_config(MINIMAL, ["cluster={executor: inline, learners: 2}"])
    with pytest.raises(ConfigError, match=r"^config: cluster.by_turns alternates .* leave one of them out$"):
        parse_config(MINIMAL, ["cluster.by_turns=true", "play.max_staleness=1"])


def test_what_only_a_gpu_or_only_the_torch_engine_can_do_is_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"^config: engine.compile fuses kernels of a GPU: .* leave it out$"):
        parse_config(MINIMAL, ["engine.compile=true"])
    assert parse_config(MINIMAL, ["engine.compile=true", "model.device=cuda"]).engine.compile
    with pytest.raises(ConfigError, match=r"engine.dtype and engine.compile are for kind: torch"):
        parse_config(MINIMAL, ["engine={kind: server, server: {url: x, model: m}, dtype: bfloat16}"])


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match=r"play is missing; add it"):
        parse_config("task: {name: countdown}")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read config nowhere.yaml"):
        load_config(Path("nowhere.yaml"))


@pytest.mark.parametrize("text", ["- 1", "a: [", "3"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text)


def test_the_written_config_reads_back_equal() -> None:
    config = parse_config(MINIMAL, ["seed=7", "play.search.strategy.leaves=4"])
    assert parse_config(config.to_yaml()) == config
    assert config.play.search.strategy.settings == {"leaves": 4}


def test_the_hash_changes_with_what_changes_traces_and_with_nothing_else() -> None:
    base = parse_config(MINIMAL).hash()
    assert parse_config(MINIMAL, ["seed=1"]).hash() != base
    assert parse_config(MINIMAL, ["play.search.temperature=0.5"]).hash() != base
    assert parse_config(MINIMAL, ["cluster.workers=7"]).hash() == base
    assert parse_config(MINIMAL, ["iterations=99"]).hash() == base
    assert parse_config(MINIMAL, ["engine.dtype=bfloat16"]).hash() != base


def test_runs_from_before_a_setting_existed_keep_their_hash() -> None:
    """Trace ids hold it: a run that was started by an older version goes on under its own."""
    assert parse_config(MINIMAL).hash() == "7f4232a713c45a1d6b0dcc16d3c90a0e95e73ca5cb2f68785aedc70fe35caefa"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cluster={learners: 2, sharding: fsdp2, by_turns: true}", "a sharded learner keeps its devices"),
        ("learn={optimizer: {name: muon}}", "muon needs whole matrices"),
        ("learn={reanalyse: true}", "a sharded learner cannot score traces again"),
    ],
)
def test_what_a_sharded_learner_cannot_do_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_config(MINIMAL, ["cluster={learners: 2, sharding: fsdp2}", override])


def test_a_device_shared_by_turns_is_refused_where_play_goes_on_while_the_learner_learns() -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        parse_config(MINIMAL, ["cluster.by_turns=true", "play.max_staleness=1"])
    parse_config(MINIMAL, ["cluster.by_turns=true"])
