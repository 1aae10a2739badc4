"""The console command ``era``, also ``python -m era``: the command lines of ``tools/`` as subcommands."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

# Of Detectron2's model zoo; known, and no concern of who uses the command.
warnings.filterwarnings("ignore", message="pkg_resources is deprecated")

from era.engine.launch import run_main  # noqa: E402
from era.engine.launchers import CONSOLE  # noqa: E402
from era.errors import UserError  # noqa: E402

COMMANDS = {  # name: (module, function, what it does, the script of tools/)
    "distil": ("era.distil.cli", "main", "from a folder of annotated pictures to a deployed detector, in one command", "distil.py"),
    "train": ("era.engine.launch", "train_net", "train or evaluate by config: students, teachers, baselines", "train_net.py"),
    "export": ("era.deploy.export", "export_main", "a trained student to TorchScript, ONNX or OpenVINO", "export.py"),
    "evaluate": ("era.deploy.evaluate", "evaluate_main", "AP and latency of exported models", "evaluate.py"),
    "predict": ("era_runtime.predict", "main", "detect objects in pictures and videos with an exported model", "predict.py"),
    "report": ("era.report.cli", "report_main", "one HTML page about one or several runs", "report.py"),
    "study": ("era.study.cli", "main", "compare variants from several seeds, as a plan says", "study.py"),
    "doctor": ("era.doctor.cli", "main", "examine a run before it is started", "doctor.py"),
}  # fmt: skip
EPILOG = """\
a detector of your own data, in two hours, and what it finds:
  era distil  --data my.json photos/ --student r18 --time 2h --dry-run     what it would do
  era distil  --data my.json photos/ --student r18 --time 2h
  era predict --model output/distil/deployed/onnx --output found photos/

by hand, with a config of yours:
  era doctor  --config-file my.yaml && era train --config-file my.yaml
  era train   --config-file my.yaml --resume
  era export  --run output/my --format onnx --output deployed
  era report  output/plain output/my --deployed deployed

`era COMMAND --help` teaches each. Exit status: 0; 1 failed; 2 a mistake in what was asked, told in one sentence;
130 Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Find the subcommand and become it; ends the program with its exit status.

    Args:
        argv: None = the program's arguments.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        sys.exit(0 if arguments else 2)
    run_main(lambda: _become(*arguments))


def help_text() -> str:
    """What ``era --help`` prints."""
    rows = "\n".join(f"  {name:<10} {what} (tools/{script})" for name, (*_, what, script) in COMMANDS.items())  # fmt: skip
    return f"usage: {CONSOLE} COMMAND ...\n\nDistillation of object detectors.\n\ncommands:\n{rows}\n\n{EPILOG}"


def _become(name: str, *arguments: str) -> int | None:
    """Call a subcommand as if it were the program.

    Raises:
        UserError: there is none of that name, or it needs the repository, which is not there.
    """
    if name not in COMMANDS:
        raise UserError(
            f"there is no command {name!r}: expected one of {', '.join(COMMANDS)}; see {CONSOLE} --help."
        )
    module, function, *_ = COMMANDS[name]
    sys.argv = [f"{CONSOLE} {name}", *arguments]
    function: Callable = getattr(importlib.import_module(module), function)
    return function(root=repository()) if name == "study" else function()


def repository() -> Path:
    """The top of the checkout that this package lies in, or that is the current folder.

    Raises:
        UserError: neither is one.
    """
    for folder in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (folder / "tools" / "train_net.py").is_file():
            return folder
    raise UserError(
        f"{CONSOLE} study trains the plans and configs of the repository, and neither this package nor {Path.cwd()} lies in "
        "a checkout: change into one."
    )


if __name__ == "__main__":
    main()
