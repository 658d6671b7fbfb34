"""The launch files of scripts/cluster are what the services, our commands and our config take, as far as that can be
checked without the services."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from selfplay.cli import app
from selfplay.config import parse_config
from tests.selfplay.test_resume import ENVIRONMENT, ROOT, outcome, run_child
from tests.selfplay.tiny_run import CONFIG as TINY

FOLDER = ROOT / "scripts" / "cluster"
RAY_UP = ("ray-up.yaml", "ray-up-local.yaml")
JOB = "kuberay-rayjob.yaml"
SLURM = "slurm.sbatch"

# Fields of the published types (ray.io/v1, ray-operator/apis/ray/v1; core/v1), as far as a launch file may use them.
STRINGS: Any = Mapping[str, str]
CONTAINER: Any = {
    "name": str, "image": str, "imagePullPolicy": str, "command": list, "args": list, "env": list, "envFrom": list,
    "ports": [{"containerPort": int, "name": str, "protocol": str}], "workingDir": str, "securityContext": dict,
    "resources": {"requests": STRINGS, "limits": STRINGS},
    "lifecycle": {"preStop": {"exec": {"command": [str]}}, "postStart": {"exec": {"command": [str]}}},
    "volumeMounts": [{"name": str, "mountPath": str, "subPath": str, "readOnly": bool}],
}  # fmt: skip
POD: Any = {
    "metadata": {"labels": STRINGS, "annotations": STRINGS},
    "spec": {
        "containers": [CONTAINER], "initContainers": [CONTAINER], "nodeSelector": STRINGS, "tolerations": list,
        "affinity": dict, "serviceAccountName": str, "terminationGracePeriodSeconds": int, "restartPolicy": str,
        "priorityClassName": str, "imagePullSecrets": list, "securityContext": dict,
        "volumes": [{
            "name": str, "configMap": {"name": str}, "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": str, "sizeLimit": str}, "secret": {"secretName": str},
        }],
    },
}  # fmt: skip
RAY_JOB: Any = {
    "apiVersion": str, "kind": str,
    "metadata": {"name": str, "namespace": str, "labels": STRINGS, "annotations": STRINGS},
    "spec": {
        "activeDeadlineSeconds": int, "backoffLimit": int, "clusterSelector": STRINGS, "submitterPodTemplate": POD,
        "metadata": STRINGS, "submitterConfig": {"backoffLimit": int}, "managedBy": str, "entrypoint": str,
        "runtimeEnvYAML": str, "jobId": str, "submissionMode": str, "entrypointResources": str,
        "entrypointNumCpus": float, "entrypointNumGpus": float, "ttlSecondsAfterFinished": int,
        "shutdownAfterJobFinishes": bool, "suspend": bool,
        "rayClusterSpec": {
            "rayVersion": str, "enableInTreeAutoscaling": bool, "suspend": bool, "headServiceAnnotations": STRINGS,
            "autoscalerOptions": {"resources": dict, "image": str, "imagePullPolicy": str, "env": list,
                                  "idleTimeoutSeconds": int, "upscalingMode": str},
            "headGroupSpec": {"serviceType": str, "enableIngress": bool, "rayStartParams": STRINGS, "template": POD},
            "workerGroupSpecs": [{"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
                                  "numOfHosts": int, "rayStartParams": STRINGS, "template": POD}],
        },
    },
}  # fmt: skip
CLAIM: Any = {
    "apiVersion": str, "kind": str, "metadata": {"name": str},
    "spec": {"accessModes": [str], "storageClassName": str, "resources": {"requests": STRINGS}},
}  # fmt: skip


def misfits(value: Any, shape: Any, where: str = "") -> Iterator[str]:
    """Fields of `value` that `shape` does not have, or that are of another kind there."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for key, inner in value.items():
            if key in shape:
                yield from misfits(inner, shape[key], f"{where}.{key}")
            else:
                yield f"{where}.{key} is unknown"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for i, inner in enumerate(value):
            yield from misfits(inner, shape[0], f"{where}[{i}]")
    elif shape is STRINGS:
        yield from (f"{where}.{k} is no text" for k, v in value.items() if not isinstance(v, str))
    elif not isinstance(value, shape):
        yield f"{where} is no {shape.__name__}"


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_the_file(name: str) -> None:
    (config,) = documents(name)
    validate_config(prepare_config(config))


def test_ray_up_would_refuse_a_wrong_key() -> None:
    (config,) = documents(RAY_UP[0])
    with pytest.raises(Exception, match="was unexpected"):
        validate_config(prepare_config({**config, "max_wrokers": 3}))


def test_the_ray_job_has_known_fields_of_the_right_kinds() -> None:
    claim, job = documents(JOB)
    assert (claim["kind"], job["kind"], job["apiVersion"]) == ("PersistentVolumeClaim", "RayJob", "ray.io/v1")
    assert list(misfits(claim, CLAIM, "claim")) == []
    assert list(misfits(job, RAY_JOB, "job")) == []
    for group in groups(job):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        for container in group["template"]["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits == requests  # Ray takes its memory limit from the container's
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][1][
        "persistentVolumeClaim"
    ] == {"claimName": claim["metadata"]["name"]}


def test_a_wrong_field_of_a_ray_job_would_be_found() -> None:
    _, job = documents(JOB)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    job["spec"]["workers"] = 3
    assert list(misfits(job, RAY_JOB, "job")) == [
        "job.spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus is no text",
        "job.spec.workers is unknown",
    ]


def groups(job: Any) -> list[Any]:
    spec = job["spec"]["rayClusterSpec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def seconds(words: list[str]) -> float:
    """The run's grace that a command line sets."""
    (value,) = [word.partition("=")[2] for word in words if word.startswith("cluster.grace_seconds=")]
    return float(value)


def test_kubernetes_waits_longer_than_the_run_needs() -> None:
    _, job = documents(JOB)
    grace = seconds(job["spec"]["entrypoint"].split())
    assert float(yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > grace
    for group in groups(job):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > grace + 20
    hook = groups(job)[0]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2]
    (waits,) = re.findall(r"\{1\.\.(\d+)\}", hook)
    assert grace < int(waits) < groups(job)[0]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_hook_of_the_head_pod_finds_the_driver_and_not_itself(tmp_path: Path) -> None:
    """The patterns are the hook's own, with a marker of this test in the place of the word `launch`."""
    _, job = documents(JOB)
    bash, flag, hook = groups(job)[0]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    name = f"pod{os.getpid()}"
    hook = hook.replace("selfplay launc[h]", f"selfplay {name[:-1]}[{name[-1]}]")
    driver = tmp_path / "driver.sh"
    driver.write_text("trap 'exit 7' TERM\necho up\nwhile :; do read -t 0.1 <> <(:) || :; done\n")
    with subprocess.Popen([bash, str(driver), "selfplay", name], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert subprocess.run([bash, flag, hook], check=False).returncode == 0
        assert process.wait() == 7
    assert subprocess.run([bash, flag, hook], check=False).returncode == 0  # nobody is there: nothing to wait for


def test_slurm_waits_longer_than_the_run_needs() -> None:
    text = (FOLDER / SLURM).read_text()
    (warning,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    (grace,) = re.findall(r"^grace_seconds=(\d+)$", text, re.MULTILINE)
    assert int(warning) >= int(grace) + 20


def command_lines(name: str) -> Iterator[list[str]]:
    """Every `selfplay` command line of a file, comments and YAML texts included, shell variables filled in."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    text = re.sub(r"\\\n\s*", "", text)
    if name == JOB:
        yield documents(name)[1]["spec"]["entrypoint"].split("-m selfplay ")[1].split()
    text = text.replace('"$@"', "cluster.workers=fit").replace("$grace_seconds", "60")
    for line in text.splitlines():
        found = re.search(r"(?:^# +|-- |-m |\"\$python\" -m )selfplay ((?:launch|resume|status|doctor) .*)$", line)
        if found and ">-" not in line and not line.strip().startswith("exec"):
            yield shlex.split(re.sub(r"\s{2,}#.*| &$", "", found[1]))


FILES = (*RAY_UP, JOB, SLURM)


@pytest.mark.parametrize("name", FILES)
def test_every_command_line_is_one_of_ours_and_every_key_exists(name: str) -> None:
    commands: Any = typer.main.get_command(app)
    lines = list(command_lines(name))
    assert len(lines) >= 2
    for command, *arguments in lines:
        parsed = commands.commands[command].make_context(command, arguments).params
        overrides = parsed.get("overrides") or []
        base = TINY.replace("executor: inline, ", "")
        if (ROOT / str(parsed.get("config"))).is_file():
            base = (ROOT / str(parsed["config"])).read_text()
        assert parse_config(base, overrides).cluster.executor == "ray"
        if command == "launch":
            assert parsed["run_dir"].startswith(("/", "s3://", "$"))
            assert parsed["or_resume"] or parsed["submit"]  # a submitted run continues by itself


@pytest.mark.parametrize("name", FILES)
def test_the_readme_and_each_file_name_each_other_and_explain_themselves(name: str) -> None:
    assert f"`{name}`" in (FOLDER / "README.md").read_text()
    lines = (FOLDER / name).read_text().splitlines()
    assert sum(line.lstrip().startswith("#") for line in lines) >= 10


SRUN = """#!/usr/bin/env bash
# Drops srun's options and runs the command here.
while [[ $1 == --* ]]; do shift; done
[[ $1 != hostname ]] || { echo 127.0.0.1; exit; }
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf 'n1\\nn2\\n' ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The batch script's command line and an environment with stand-ins for Slurm's commands."""
    import shutil
    import tempfile

    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    config = tmp_path / "slurm.yaml"
    config.write_text(TINY.replace("executor: inline", "executor: ray, workers: 2"))
    rays = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths must be short
    environment = {
        **ENVIRONMENT,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SELFPLAY_PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "RAY_TMPDIR": rays,
        "REQUEUED": str(tmp_path / "requeued"),
    }
    yield ["bash", str(FOLDER / SLURM), str(config), str(tmp_path / "run")], environment
    shutil.rmtree(rays, ignore_errors=True)


def test_the_slurm_script_is_bash_and_wants_its_arguments() -> None:
    assert subprocess.run(["bash", "-n", str(FOLDER / SLURM)], check=False).returncode == 0
    alone = subprocess.run(["bash", str(FOLDER / SLURM)], capture_output=True, text=True, check=False)
    assert alone.returncode != 0
    assert "usage: sbatch slurm.sbatch CONFIG RUN_DIR" in alone.stderr


@pytest.mark.cluster
@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_requeues_itself_and_goes_on_to_the_same_end(
    slurm: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    command, environment = slurm
    inline = run_child("never", tmp_path / "inline")
    assert inline.returncode == 0, inline.stderr
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as job:
        assert job.stdout is not None
        lines = []
        for line in job.stdout:
            lines.append(line)
            if line.startswith("iteration 1 play"):
                job.send_signal(signal.SIGTERM)
    assert job.returncode == 0, "".join(lines)
    assert (tmp_path / "requeued").read_text().split() == [environment["SLURM_JOB_ID"]]
    assert "back into the queue" in lines[-1]
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len((tmp_path / "requeued").read_text().split()) == 1
    assert outcome(tmp_path / "run") == outcome(tmp_path / "inline")
    logs = sorted(path.name for path in tmp_path.glob("ray-*.log"))
    assert [name.rpartition("-")[2] for name in logs] == ["n1.log", "n2.log"]  # two nodes ran
    assert "Ray runtime started" in (tmp_path / logs[1]).read_text()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_slurm_job_whose_run_fails_fails_and_is_not_requeued(
    slurm: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    command, environment = slurm
    failed = subprocess.run(
        [*command, "task.numbers=99"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert not (tmp_path / "requeued").exists()
