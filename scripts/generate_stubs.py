"""Generate the typed stubs beside the .proto files, or with --check say whether the committed ones are stale."""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent / "protos"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Write the stubs of every .proto below protos/luthier into `out`, which gets the same folders."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("luthier/**/*.proto"))
    scripts = Path(sys.executable).parent
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources,
        ]
    )
    if status != 0:
        raise SystemExit(status)


def generated_files(root: Path) -> set[Path]:
    """Relative paths of the generated files below `root`."""
    return {path.relative_to(root) for pattern in GENERATED for path in root.glob(f"luthier/**/{pattern}")}


def main() -> None:
    """Entry point of `make proto` and of the stale-stub check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the committed stubs are stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        wanted, present = generated_files(fresh), generated_files(ROOT)
        stale = sorted(
            str(path)
            for path in wanted | present
            if path not in wanted or path not in present or not filecmp.cmp(fresh / path, ROOT / path, shallow=False)
        )
        if not check:
            for path in present - wanted:
                (ROOT / path).unlink()
            for path in wanted:
                shutil.copyfile(fresh / path, ROOT / path)
        elif stale:
            print("stale stubs, run `make proto`:", *stale, sep="\n  ", file=sys.stderr)
            raise SystemExit(1)


if __name__ == "__main__":
    main()
