"""Values of the wrong type, out of range, or naming files that do not exist: found before torch is imported."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest

from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.commands import run_command
from lightning_prune.cli.config import UsageError, conf_dir
from lightning_prune.cli.early_checks import check_arguments, located
from lightning_prune.cli.main import main
from lightning_prune.cli.preflight import check, composed
from lightning_prune.cli.source_signatures import find_definition, signature_of
from lightning_prune.cli.value_checks import BOUNDS, QUANTITIES, problems
from lightning_prune.cli.value_types import accepts
from lightning_prune.cli.warning_lines import show_sentences
from lightning_prune.selection.policy import ALWAYS, BUILT_IN


def message(*arguments: str) -> str:
    with pytest.raises(UsageError) as refused:
        check(TrainArguments.parse(arguments))
    return str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["trainer.max_epochs=drei"],
            "trainer.max_epochs is 'drei', which is text, and must be a whole number",
        ),
        (["trainer.max_epochs=2.5"], "trainer.max_epochs is 2.5, and must be a whole number"),
        (["net.encoder_depth=5.0"], "must be a whole number; did you mean net.encoder_depth=5?"),
        (
            ["optimizer.lr='0,01'"],
            "optimizer.lr is '0,01', which is text, and must be a number; did you mean",
        ),
        (["optimizer.lr=-1"], "optimizer.lr is -1, and must be at least 0"),
        (["data.batch_size=0"], "data.batch_size is 0, and must be at least 1"),
        (["data.batch_size=[8]"], "data.batch_size is [8], a list, and must be a whole number"),
        (["prune.budget.macs=half"], "and must be a mapping, each a number"),
        (
            ["prune.budget.macs=0"],
            "prune.budget.macs is 0, and must be a share from 0 to 1, or an amount above 1",
        ),
        (["prune.optimizer=rset"], "must be reset or carry; did you mean prune.optimizer=reset?"),
        (["prune.compensate=ja"], "prune.compensate is 'ja', which is text, and must be true or false"),
        (["prune.criterion.omega=2"], "prune.criterion.omega is 2, and must be from 0 to 1"),
        (["prune.criterion=l2"], "prune.criterion is 'l2'"),
        (["+trainer.max_epoch=3"], "has no argument 'max_epoch'; did you mean trainer.max_epochs?"),
        (["net=fpn", "net.decoder_dropout=x"], "net.decoder_dropout is 'x'"),
        (["task.num_classes=x"], "task.num_classes is 'x'"),
        (["seed=null"], "seed is null, and must be a whole number"),
        (["-m", "data.batch_size=8,x"], "data.batch_size is 'x'"),
        (["data=folder", "data.root=/nope", "task.num_classes=3"], "data.root: there is no folder /nope"),
        (["ckpt_path=none.ckpt"], "ckpt_path: there is no file none.ckpt"),
        (["+prune.budget.parms=0.5"], "macs, params or activations; did you mean +prune.budget.params=0.5?"),
        (["prune.budget.latency_ms=3"], "+prune/resources=latency +prune.budget.latency=3000000 '~prune."),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(arguments: list[str], expected: str) -> None:
    assert expected in message(*arguments)


def test_all_wrong_values_are_named_at_once_and_before_torch_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['lightning-prune', 'trainer.max_epochs=drei', 'optimizer.lr=abc']\n"
        "from lightning_prune.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 1)
    assert len(done.stderr.splitlines()) == 2
    assert "Traceback" not in done.stderr


OPTIONS = sorted(
    f"{path.parent.relative_to(conf_dir())}={path.stem}"
    for path in conf_dir().rglob("*.yaml")
    if path.parent.name not in ("conf", "sweep", "protocol", "policy")
)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_the_configuration_is_right(option: str, tmp_path: Path) -> None:
    given = ["task.num_classes=3", f"data.root={tmp_path}"] if option == "data=folder" else []
    prefix = "+" if option.startswith("prune/resources") else ""
    wrong = problems(composed(TrainArguments([prefix + option, *given])))
    assert [line for line in wrong if "there is no folder" not in line] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["trainer.devices=auto", "trainer.precision=16-mixed", "trainer.limit_train_batches=3"],
        ["data.num_workers=2", "optimizer.lr=1", "prune.limits.layers=1", "trainer.max_epochs=-1"],
        ["ckpt_path=last", "prune.budget.macs=1000000", "prune.compensate=false"],
        ["+prune/resources=latency", "+prune.budget.latency=0.5", "~prune.budget.macs"],
        ["+optimizer.betas=[0.8,0.9]", "net.decoder_channels=[64,32,16,8,8]"],
        ["prune=none"],
        ["+callbacks.own._target_=own.Own", "+callbacks.own.anything=drei"],
    ],
)
def test_right_values_are_not_refused(arguments: list[str]) -> None:
    check(TrainArguments.parse(arguments))


def test_the_class_of_a_user_is_read_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Literal, Optional\n"
        "Mode = Literal['fast', 'slow']\n"
        "class Base:\n    def __init__(self, width: 'int', mode: Mode = 'fast', deep: Optional[int] = 3): ...\n"
        "class Net(Base): ...\n"
        "@dataclass\nclass Setting:\n    rate: float = 1\n    names: tuple[str, ...] = ()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    net, setting = signature_of("own_package.Net"), signature_of("own_package.Setting")
    assert net is not None
    assert setting is not None
    width, mode, deep = net.parameters.values()
    assert [accepts(width, value) for value in (3, "3", 3.5, True, None)] == [
        True,
        False,
        False,
        False,
        False,
    ]
    assert [accepts(mode, value) for value in ("slow", "slw", 3)] == [True, False, False]
    assert [accepts(deep, value) for value in (None, 2, "x")] == [True, True, False]
    assert accepts(setting.parameters["names"], ["a"])
    assert not accepts(setting.parameters["names"], ["a", 3])
    assert not net.is_open


def test_bounds_are_those_of_the_constructors() -> None:
    from lightning_prune import FilterPruningCallback, Limits
    from lightning_prune.criteria import IPAD

    lowest = {key: low for key, (low, _) in BOUNDS.items()}
    for make in (
        lambda: IPAD(omega=BOUNDS["prune.criterion.omega"][1] + 0.1),
        lambda: IPAD(omega=lowest["prune.criterion.omega"] - 0.1),
        lambda: Limits(BOUNDS["prune.limits.layers"][1] + 0.1),
        lambda: FilterPruningCallback({"macs": 0.5}, every_n_epochs=lowest["prune.every_n_epochs"] - 1),
        lambda: FilterPruningCallback({"macs": 0.5}, start_epoch=lowest["prune.start_epoch"] - 1),
    ):
        with pytest.raises(ValueError, match=r"\S"):
            make()


def test_a_budget_of_an_unknown_quantity_is_refused_at_construction() -> None:
    from lightning_prune import FilterPruningCallback

    with pytest.raises(ValueError, match=r"known are activations, macs, params; did you mean 'macs'\?"):
        FilterPruningCallback({"mac": 0.5})
    with pytest.raises(ValueError, match="unknown resource 'time' in amount"):
        FilterPruningCallback({"macs": 0.5}, amount={"time": 0.1})


def test_plan_answers_a_misspelt_network_and_a_wrong_value_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"did you mean torchvision\.models\.resnet18\?"):
        run_command("plan", ["torchvision.models.resnet81"])
    with pytest.raises(SystemExit, match=r"prune\.optimizer is 'rset'"):
        run_command("plan", ["prune.optimizer=rset"])


def test_quantities_of_budgets_are_those_that_policies_count() -> None:
    """They are named twice, since the command line must not import torch."""
    assert {*QUANTITIES} == {*ALWAYS, *BUILT_IN}


def test_the_help_of_train_fits_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-prune", "train", "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with contextlib.suppress(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("prune/criterion: ") for line in lines)
    assert "taylor_weight" in "".join(lines)


def test_runs_to_compare_are_found_by_the_name_of_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in ("outputs/2026-11-27/10-00-00", "outputs/2026-11-28/10-00-00", "multirun/2026-11-28/11-00-00"):
        (tmp_path / day).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert located(Path("11-00-00")) == Path("multirun/2026-11-28/11-00-00")
    assert located(Path("outputs")) == Path("outputs")
    with pytest.raises(ValueError, match=r"may be outputs/2026-11-27/10-00-00 or outputs/2026-11-28"):
        located(Path("10-00-00"))
    with pytest.raises(FileNotFoundError, match=r"did you mean 11-00-00\?"):
        located(Path("11-00-01"))


def test_the_first_check_of_compare_finds_runs_by_their_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for day in ("27", "28"):
        (tmp_path / "outputs" / f"2026-11-{day}" / "10-00-00").mkdir(parents=True)
    (tmp_path / "outputs" / "2026-11-28" / "11-00-00").mkdir()
    monkeypatch.chdir(tmp_path)
    check_arguments("compare", Namespace(runs=[Path("11-00-00"), Path("outputs")]))
    with pytest.raises(
        UsageError, match=r"^10-00-00 may be outputs/2026-11-27/10-00-00 or outputs/2026-11-28"
    ):
        check_arguments("compare", Namespace(runs=[Path("outputs"), Path("10-00-00")]))
    with pytest.raises(UsageError, match=r"of runs or of sweeps; did you mean 11-00-00\?$"):
        check_arguments("compare", Namespace(runs=[Path("11-00-01")]))


def test_warnings_of_the_package_are_sentences_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    show_sentences()
    once = warnings.formatwarning
    show_sentences()
    assert warnings.formatwarning is once
    own = str(Path(check.__code__.co_filename))
    assert once("not met", UserWarning, own, 3) == "warning: not met\n"
    assert "elsewhere.py:3" in once("other", UserWarning, "/elsewhere.py", 3)


def test_a_class_in_folders_without_init_files_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_outer" / "inner" / "deep").mkdir(parents=True)
    (tmp_path / "own_outer" / "inner" / "deep" / "parts.py").write_text("class Part:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_definition("own_outer.inner.deep.parts.Part") is not None
    assert find_definition("own_outer.inner.none.Part") is None
