"""Messages about a command line that cannot be run: at once, in words, with the nearest that exists."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.commands import COMMANDS, OVERVIEW, run_command
from lightning_prune.cli.config import UsageError
from lightning_prune.cli.main import main
from lightning_prune.cli.parsers import CUTS, EXECUTIONS, read
from lightning_prune.cli.preflight import check
from lightning_prune.cli.sensitivity import weight_criterion
from lightning_prune.latency.backends import ExecutionName
from lightning_prune.latency.table import LatencyTable

WITHOUT_NILEARN = """
import sys
sys.modules["nilearn"] = None  # as if it were not installed
sys.argv = ["lightning-prune", *sys.argv[1:]]
from lightning_prune.cli.main import main
try:
    main()
finally:
    slow = {"torch", "lightning", "matplotlib"} & sys.modules.keys()
    print(sorted(slow))
"""


def message(*arguments: str) -> str:
    with pytest.raises(UsageError) as refused:
        check(TrainArguments.parse(arguments))
    return str(refused.value)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what the command prints before it ends with exit code 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-prune", *arguments])
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["-m", "seed=1,2"], ["train"]])
def test_without_the_example_data_the_first_second_says_what_to_install(arguments: list[str]) -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NILEARN, *arguments], capture_output=True, text=True, check=False
    )
    assert "pip install 'lightning-prune[demo]'" in done.stderr
    assert "data=folder data.root=DIR task.num_classes=5" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "[]\n"  # nothing that takes seconds to import
    assert done.returncode == 1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime + used.ru_stime - start.ru_utime - start.ru_stime < 1


def test_other_data_need_no_example_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)
    check(TrainArguments.parse(["data=fashion_mnist"]))
    assert "lightning-prune[demo]" in message("net=fpn")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["traner=cpu"], "did you mean trainer=cpu?"),
        (["trainer.max_epoch=3"], "did you mean trainer.max_epochs=3?"),
        (["prune.criterion.omegga=1"], "did you mean prune.criterion.omega=1?"),
        (["omega=1"], "did you mean prune.criterion.omega=1?"),
        (["prune=slimming", "prune.budget.maks=0.3"], "did you mean prune.budget.macs=0.3?"),
        (["net=ritnet", "net.widht=8"], "did you mean net.width=8?"),  # a key of the chosen network only
        (["prune=ipadd"], "did you mean prune=ipad?"),
        (["prune/criterion=taylor_gates"], "did you mean prune/criterion=taylor_gate?"),
        (["net=xyz"], "options: atom_mobile, "),
        (["-m", "seed=1,2", "net=unet,fpnn"], ""),  # found when that run starts
        (["-m", "prune=ipadd,l2"], "did you mean prune=ipad?"),
        (["prune.amount.macs=0.1"], "did you mean 'prune.amount={macs:0.1}'?"),
        (["prune.budget.params=0.3"], "did you mean +prune.budget.params=0.3? '~prune.budget.macs'"),
        (["xyz.abc=3"], "To add a key that does not exist yet: +xyz.abc=3"),
    ],
)
def test_the_nearest_key_or_option_is_named(arguments: list[str], expected: str) -> None:
    if expected:
        assert expected in message(*arguments)
    else:
        check(TrainArguments.parse(arguments))


def test_missing_values_are_named_all_at_once_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "data=folder")
    assert "data.root=...  the folder of the data" in text
    assert "task.num_classes=...  the number of classes, background included" in text
    assert "add for example: task.num_classes=5 data.root=DIR" in text
    assert "Interpolation" not in text
    assert "data.root" not in refused(capsys, "data=folder", "data.root=here")


def test_a_misspelt_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean lightning-prune sensitivity?" in refused(capsys, "sensitvity", "run")
    assert "settings have the form KEY=VALUE" in refused(capsys, "seed")


def test_flags_of_hydra_are_no_overrides() -> None:
    words = TrainArguments.parse(["--cfg", "job", "-m", "-cn", "other", "a=1,2", "--config-dir=x", "+b=1"])
    assert (words.overrides, words.config_name, words.sweeps) == (["a=1,2", "+b=1"], "other", True)
    assert words.config_dir == Path("x")
    assert not words.asks
    assert TrainArguments.parse(["--help"]).asks
    assert TrainArguments.parse(["-cp", "/tmp"]).asks


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_help_of_each_command_fits_a_screen_and_comes_at_once(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        read(command, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 80
    assert "``" not in "".join(lines)


def test_arguments_of_commands_are_read_before_torch_is_imported() -> None:
    code = "import sys; sys.argv = ['lightning-prune', 'export', '--wrong']\n"
    code += "from lightning_prune.cli.main import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n"
    assert "usage: lightning-prune export" in done.stderr


def test_parsers_know_the_executions_and_cuts_of_latency_tables() -> None:
    assert get_args(ExecutionName) == EXECUTIONS
    assert LatencyTable.cuts == CUTS


def test_a_folder_of_configurations_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "--config-dir: there is no folder" in message("--config-dir", str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["mine", "it's [mine], and: {yours}"])
def test_options_of_ones_own_folder_are_found(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (folder / "net").mkdir(parents=True)
    (folder / "net" / "mine.yaml").write_text("_target_: own_nets.Tiny\nwidth: 8\n")
    check(TrainArguments.parse(["--config-dir", str(folder), "net=mine", "net.width=4"]))
    assert "did you mean net.width=4?" in message("-cd", str(folder), "net=mine", "net.widht=4")
    assert "did you mean net=mine?" in message("-cd", str(folder), "net=miine")


def test_the_overview_fits_a_screen_and_lists_all_commands() -> None:
    lines = OVERVIEW.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert {"train", *COMMANDS} - {"oneshot", "netadapt"} == {
        line.split()[0] for line in lines[lines.index("commands; each has --help") + 1 :][: len(COMMANDS) - 1]
    }


def test_commands_answer_misspelt_settings_with_the_nearest_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean prune/criterion=fpgm\?"):
        weight_criterion("fpgn")
    with pytest.raises(
        SystemExit, match=r"lightning-prune latency: Could not find net='fpnn'.\ndid you mean net=fpn"
    ):
        run_command("latency", [str(tmp_path / "table.json"), "net=fpnn"])
    with pytest.raises(SystemExit, match="holds no run: there is no"):
        run_command("prune", [str(tmp_path), str(tmp_path / "out")])
