"""Mixed-supervision training (ConfKD) for nnU-Net v2."""
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.2.0"


def _require_nnunet() -> None:
    """Raise ImportError for other versions of nnU-Net, in which anything could fail later."""
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        found = "none"
    if found.split(".")[:2] != ["2", "8"]:
        raise ImportError(f"nnunet_confkd {__version__} works with nnunetv2 2.8, but {found} is installed: "
                          f"pip install 'nnunetv2>=2.8,<2.9', or look for a version of nnunet_confkd that fits yours.")


_require_nnunet()
# In a checkout that is not installed, two of the packages lie beside this one (see setup.py).
if not (Path(__file__).parent / "trainers").exists():
    __path__.append(str(Path(__file__).parent.parent))
