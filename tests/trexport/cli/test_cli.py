"""The command line as its users type it: help, JSON, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trexport.helpers import copy_of, leftovers, run_cli
from tests.trexport.pipelines import STATIC
from trexport.artifact import Artifact, open_artifact
from trexport.cli import COMMANDS

TREXPORT = [sys.executable, "-m", "trexport.cli"]


GROUPS = {"deploy": "deploy triton"}


@pytest.mark.parametrize("command", [GROUPS.get(command, command) for command in COMMANDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli([*command.split(), flag]) == 0
    text = capsys.readouterr().out
    assert f"Usage: trexport {command}" in text
    assert "--json" in text


def test_the_list_of_commands_and_the_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["-h"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    assert "Exit codes" in text


def test_merge_then_validate_then_inspect_as_json(
    unet_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run_cli(["merge", unet_folder, f"{adapter_folder}=0.5", "-o", out, "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)
    assert len(merged["layers"]) == 32
    assert merged["unchanged"] == []
    quick = ["--timesteps", "5", "--seeds", "1", "--trajectory-steps", "2", "--sequence-length", "4"]
    assert run_cli(["validate", out, *quick, "--json"]) == 0
    parity = json.loads(capsys.readouterr().out)
    assert parity["passed"] is True
    assert run_cli(["inspect", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"][0]["strength"] == 0.5
    assert found["verified"] is True


def test_tables_for_people(
    unet_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert run_cli(["merge", unet_folder, adapter_folder, "-o", out]) == 0
    text = capsys.readouterr().out
    assert "relative change" in text
    assert str(out) in text
    assert run_cli(["validate", out, "--timesteps", "5", "--seeds", "1", "--trajectory-steps", "2"]) == 0
    assert "passed" in capsys.readouterr().out
    assert run_cli(["inspect", adapter_folder]) == 0
    assert "TLoRA(2,6)" in capsys.readouterr().out


def test_parity_not_met_is_exit_code_3(onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--timesteps", "5", "--seeds", "1", "--trajectory-steps", "0", "--no-locate", "--max-relative-l2", "1e-12"]
    assert run_cli(["validate", onnx_artifact.folder, *quick]) == 3
    captured = capsys.readouterr()
    assert "parity not met" in captured.err
    assert run_cli(["validate", onnx_artifact.folder, *quick, "--json"]) == 3
    fields = json.loads(capsys.readouterr().out)
    assert fields["passed"] is False
    assert fields["failures"]


def test_bench_writes_json_and_a_plot(
    onnx_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench"
    sizes = ["--height", "8", "--width", "8", "--sequence-length", "5", "--batch-size", "1"]
    backends = ["--backend", "torch", "--backend", "onnxruntime"]
    quick = ["--iterations", "3", "--warm-up", "1", "--device", "cpu"]
    assert run_cli(["bench", onnx_artifact.folder, *backends, *sizes, *quick, "-o", out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((out / "bench.json").read_text()) == printed
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [result["backend"] for result in printed["results"]] == ["torch", "onnxruntime"]
    assert run_cli(["bench", onnx_artifact.folder, *backends, *sizes, *quick]) == 0
    assert "roofline" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["merge", "onnx"])
def test_a_dry_run_writes_nothing(
    command: str, unet_folder: Path, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, unet_folder, adapter_folder, "-o", tmp_path / "out", "--dry-run"]
    assert run_cli([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] > 0
    assert run_cli(arguments) == 0
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nosuch"], 2),
        (["merge"], 2),
        (["merge", "random:tiny"], 2),
        (["merge", "random:tiny", "-o", "{tmp}/x"], 2),
        (["merge", "random:tinny", "random:lora:2", "-o", "{tmp}/x"], 2),
        (["merge", "random:tiny", "random:lora:2=x", "-o", "{tmp}/x"], 2),
        (["merge", "random:tiny", "random:lora:2", "-o", "{tmp}/x", "--dtype", "int8"], 2),
        (["merge", "no/such", "random:lora:2", "-o", "{tmp}/x"], 1),
        (["merge", "random:tiny", "{tmp}/nothing", "-o", "{tmp}/x"], 1),
        (["onnx", "random:tiny", "-o", "{tmp}/x", "--opset", "5"], 2),
        (["onnx", "random:tiny", "-o", "{tmp}/x", "--height", "9"], 2),
        (["inspect", "{tmp}/nothing"], 1),
        (["validate", "{tmp}/nothing"], 1),
        (["validate", "{tmp}", "--timesteps", "a"], 2),
        (["validate", "{tmp}", "--timesteps", "5000"], 2),
        (["bench", "random:tiny", "--backend", "tensorflow"], 2),
        (["demo", "--adapter", "ten", "-o", "{tmp}/x"], 2),
    ],
)
def test_wrong_usage_has_one_message_and_its_exit_code(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    work = tmp_path / "work"
    assert run_cli([argument.format(tmp=work) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert [line.startswith("Error: ") for line in captured.err.splitlines()].count(True) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert leftovers(work) == []


def test_a_missing_device_is_exit_code_4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["bench", "random:tiny", "--backend", "torch", "--device", "cuda", "--iterations", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["trexport", *command])  # errors look there for --json
    assert run_cli(command) == 4
    printed = capsys.readouterr()
    assert json.loads(printed.out)["exit_code"] == 4
    assert "CUDA" in printed.err


def test_a_missing_package_breaks_only_what_needs_it(
    onnx_artifact: Artifact, unet_folder: Path, adapter_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_cli(["merge", unet_folder, adapter_folder, "-o", tmp_path / "out"]) == 0
    capsys.readouterr()
    assert run_cli(["validate", onnx_artifact.folder, "--timesteps", "5", "--trajectory-steps", "0"]) == 4
    assert "trexport[onnxruntime]" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [*TREXPORT, "onnx", "random:tiny", "random:tlora:2:6", "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not leftovers(tmp_path) and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None  # it is at work, in its temporary folder
        time.sleep(0.5)
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == 1
    assert "interrupted" in error
    assert "Traceback" not in error
    assert leftovers(tmp_path) == []


def test_an_output_that_is_not_empty_is_refused_before_any_work(
    unet_folder: Path, adapter_folder: Path, onnx_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(onnx_artifact.folder, tmp_path / "out")
    for command in ("merge", "onnx"):
        assert run_cli([command, unet_folder, adapter_folder, "-o", out]) == 1
        assert "--overwrite" in capsys.readouterr().err
    open_artifact(out)  # still whole
    assert run_cli(["merge", unet_folder, adapter_folder, "-o", out, "--overwrite"]) == 0
    assert open_artifact(out).manifest.kind == "dense"
    assert leftovers(tmp_path) == ["out"]


def test_factored_then_adapter_then_validate(
    unet_folder: Path, adapter_folder: Path, lora_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "factored", tmp_path / "a.onnx_adapter"
    sizes = ["--static", *STATIC]
    assert run_cli(["onnx", unet_folder, adapter_folder, "-o", out, "--factored", *sizes]) == 0
    assert "path plan for cpu" in capsys.readouterr().out
    assert run_cli(["validate", out, "--trajectory-steps", "0", "--seeds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert run_cli(["adapter", "random:tlora:1:6=0.5", "--for", out, "-o", file, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"]
    assert not file.exists()
    assert run_cli(["adapter", "random:tlora:1:6=0.5", "--for", out, "-o", file]) == 0
    assert file.stat().st_size > 0
    assert run_cli(["adapter", "random:tlora:1:6", "--for", out, "-o", file]) == 1  # exists
    capsys.readouterr()
    assert run_cli(["adapter", lora_folder, "--for", out, "-o", tmp_path / "b.onnx_adapter"]) == 1
    assert "the graph takes" in capsys.readouterr().err
    assert run_cli(["adapter", "random:tlora:1:6", "--for", out, "-o", tmp_path / "b.txt"]) == 2
    assert leftovers(tmp_path) == ["a.onnx_adapter", "factored"]


@pytest.mark.parametrize(
    "options", [["--blank"], ["--path", "dense"], ["--optimum", "2x8x8x5"], ["--factored", "--optimum", "2x8"]], ids=str
)
def test_options_of_the_factored_form_without_it(
    options: list[str], unet_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    assert run_cli(["onnx", unet_folder, adapter_folder, "-o", tmp_path / "x", *options]) == 2
    assert leftovers(tmp_path) == []
