"""Installed versions: what Shikomi declares, what the packages declare of each other, and known bad pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "bitsandbytes")
"""Those that are shown on lines of their own; bitsandbytes is the only one that may be missing."""


@dataclass(frozen=True)
class BadPair:
    """Versions that do not work together: {package: versions}, what happens, where it is reported, a way out.

    Versions are those of `packaging`: ">=2,<3".
    """

    versions: Mapping[str, str]
    what: str
    source: str
    fix: str


BAD_PAIRS = (
    BadPair(
        {"numpy": ">=2", "torch": "<2.3"},
        "torch was built for NumPy 1: tensors cannot be exchanged with NumPy 2",
        "https://github.com/pytorch/pytorch/issues/107302",
        "pip install --upgrade 'torch>=2.9'",
    ),
    BadPair(
        {"transformers": ">=5", "torch": "<2.4"},
        "transformers switches torch off, and finds no model class",
        "https://github.com/alibaba-damo-academy/Lumos/issues/8",
        "pip install --upgrade 'torch>=2.9'",
    ),
    BadPair(
        {"transformers": ">=5", "huggingface-hub": "<1"},
        "transformers cannot be imported: huggingface_hub has no is_offline_mode",
        "https://github.com/pydantic/pydantic-ai/issues/4092",
        "pip install --upgrade 'huggingface_hub>=1'",
    ),
    BadPair(
        {"transformers": "<5", "huggingface-hub": ">=1"},
        "transformers 4 refuses huggingface_hub 1",
        "https://github.com/pytorch/executorch/pull/15398",
        "pip install --upgrade 'transformers>=5.3'",
    ),
    BadPair(
        {"triton": ">=3.2", "bitsandbytes": "<0.45.1"},
        "bitsandbytes cannot be imported: No module named 'triton.ops'",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1492",
        "pip install --upgrade 'bitsandbytes>=0.50'",
    ),
)

MINIMUM_DRIVER = {13: 580, 12: 525, 11: 450}
"""Major version of CUDA -> the oldest NVIDIA driver that serves it.

https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
"""
OLD_GPUS = "https://github.com/pytorch/pytorch/issues/172352"
"""Which builds of torch dropped which GPUs: since 2.11 only those for CUDA 12.6 serve Maxwell, Pascal and Volta."""
MPS_BF16 = "https://github.com/pytorch/torchchat/issues/616"
"""bf16 on Apple's GPUs needs macOS 14."""


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, by canonical name."""
    found = {}
    for name in names:
        try:
            found[canonicalize_name(name)] = version(name)
        except PackageNotFoundError:
            continue
    return {str(name): value for name, value in found.items()}


def declared(package: str) -> list[Requirement]:
    """What an installed package requires on this machine, extras left out; nothing for one that is not installed."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def extra_of(package: str, extra: str) -> list[Requirement]:
    """What an extra of an installed package adds."""
    found = [Requirement(line) for line in requires(package) or []]
    always = declared(package)
    return [r for r in found if r not in always and r.marker is not None and r.marker.evaluate({"extra": extra})]


def satisfies(found: str, allowed: str) -> bool:
    """Whether a version is among `allowed`; pre-releases and local builds (2.13.0+cpu) count as their version."""
    try:
        plain = Version(found)
    except InvalidVersion:
        return False
    return Requirement(f"x{allowed}").specifier.contains(Version(plain.base_version), prereleases=True)


def known_to_be_bad(versions: Mapping[str, str], pairs: Sequence[BadPair] = BAD_PAIRS) -> list[BadPair]:
    """The bad pairs among installed versions."""
    return [
        pair
        for pair in pairs
        if all(name in versions and satisfies(versions[name], wanted) for name, wanted in pair.versions.items())
    ]


def unmet(requirements: Mapping[str, Sequence[Requirement]], versions: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(package, what it requires, what is installed) of the requirements that are not met, as in `pip check`."""
    found = []
    for package, wanted in requirements.items():
        for requirement in wanted:
            here = versions.get(str(canonicalize_name(requirement.name)))
            if here is None or not satisfies(here, str(requirement.specifier)):
                found.append((package, f"{requirement.name}{requirement.specifier}", here or "not installed"))
    return found
