"""Whether a folder holds what a release publishes and nothing else: python .ci/release_check.py FOLDER [TAG]

One sdist, of its version the wheel for every system, and a wheel with kernels for each Python and processor. Where a
tag is given, it is the version, alone or behind a v.
"""

import re
import sys
import tarfile
from pathlib import Path

PYTHONS = ("cp310", "cp311", "cp312", "cp313", "cp314")
PROCESSORS = ("x86_64", "aarch64")


def version_of(sdist: Path) -> str:
    """As its metadata has it, which is what an index believes."""
    with tarfile.open(sdist) as packed:
        inside = packed.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        text = inside.read().decode() if inside else ""
    return "".join(re.findall(r"^Version: (.+)$", text, re.MULTILINE)[:1])


def problems(folder: Path, tag: str = "") -> list[str]:
    """What is wrong, a line each; none if all is there."""
    names = {path.name for path in folder.iterdir()}
    sdists = sorted(name for name in names if name.endswith(".tar.gz"))
    if len(sdists) != 1:
        return [f"expected one sdist, found {sdists}"]
    version = version_of(folder / sdists[0])
    package = f"cmdp_fast-{version}"
    found = []
    if tag and tag.removeprefix("v") != version:
        found.append(f"the tag is {tag!r}, the version {version!r}")
    if sdists[0] != f"{package}.tar.gz":
        found.append(f"the sdist {sdists[0]} is of the version {version!r}")
    expected = {f"{package}.tar.gz", f"{package}-py3-none-any.whl"}
    for python in PYTHONS:
        for processor in PROCESSORS:
            # Of the tags that auditwheel gives, all that an older manylinux has too
            systems = rf"(?:manylinux_2_\d+_{processor}\.)*manylinux_2_28_{processor}(?:\.manylinux_2_\d+_{processor})*"
            native = re.compile(rf"{re.escape(package)}-{python}-{python}-{systems}\.whl")
            wheels = sorted(filter(native.fullmatch, names))
            if len(wheels) != 1:
                found.append(f"expected one wheel of {python} for manylinux_2_28_{processor}, found {wheels}")
            expected |= {*wheels}
    found += [f"missing: {name}" for name in sorted(expected - names)]
    return found + [f"not expected: {name}" for name in sorted(names - expected)]


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]), *sys.argv[2:3])
    print("\n".join(wrong) or f"{sys.argv[1]} holds a release")
    sys.exit(1 if wrong else 0)
