"""NEW."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf.errors import OmegaConfBaseException

#: what a wrong configuration or wrong data raises; anything else is shown with its traceback
EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    NotImplementedError,
    OmegaConfBaseException,
    InstantiationException,
)


def conf_dir() -> Path:
    """The folder of configurations: inside the installed package, else at the top of the checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no conf/config.yaml in {package} or {package.parent}: reinstall lightning-prune"
    )


def overrides_as_dict(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides as key -> value.

    Example:
        >>> as_dict(["prune.criterion.omega=0", "+a=b=c", "~x"])
        {'prune.criterion.omega': '0', 'a': 'b=c', 'x': ''}
    """
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def root_cause(error: BaseException) -> str:
    """What an error that others wrapped was at first, and at which key of the configuration.

    Example:
        >>> try:
        ...     raise InstantiationException("...\\nfull_key: prune.criterion") from ValueError("omega is 2")
        ... except InstantiationException as error:
        ...     reason(error)
        'prune.criterion: ValueError: omega is 2'
    """
    lines = str(error).splitlines() if isinstance(error, InstantiationException) else []
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    while error.__cause__ is not None:
        error = error.__cause__
    return ": ".join([*keys, type(error).__name__, *filter(None, [str(error)])])
