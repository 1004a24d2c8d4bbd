# SPDX-License-Identifier: Apache-2.0
"""Unpack a wheel without its compiled libraries: `python unpack_wheel.py WHEEL FOLDER`."""

import sys
import zipfile
from pathlib import Path


def main(wheel: str, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".so") and ".so." not in Path(name).name]
        archive.extractall(folder, names)
    print(f"{folder}: {len(names)} files from {Path(wheel).name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
