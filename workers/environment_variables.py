"""Environment variables that change what is measured, without anything secret."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Of a variable whose name matters and whose value is not for a file that people pass around.
WITHHELD = "(withheld)"

# Threads and processor libraries, CUDA and its libraries, torch and its compilers, transformers and tokenizers.
_PREFIXES = (
    "ATEN_",
    "BLIS_",
    "CUBLAS_",
    "CUDA_",
    "CUDNN_",
    "DNNL_",
    "GOMP_",
    "HF_",
    "KMP_",
    "MALLOC_",
    "MKL_",
    "NCCL_",
    "NVIDIA_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTORCH_",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
)
_NAMES = ("LD_PRELOAD", "PYTHONOPTIMIZE", "RAYON_NUM_THREADS")

_SECRET_WORDS = {"TOKEN", "TOKENS", "KEY", "KEYS", "AUTH", "PAT", "PASS", "COOKIE", "COOKIES", "BEARER", "HEADERS"}
_SECRET_PARTS = ("SECRET", "PASSW", "CREDENTIAL", "APIKEY")

# Prefixes of well-known services' tokens, a user in a URL, and long words in which letters and digits mix as in no
# name; uuids and paths are broken up by their separators.
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|eyJ)\w|//[^/\s@]+@"
    r"|(?=[A-Za-z0-9+=_]*[0-9])(?=[A-Za-z0-9+=_]*[A-Za-z])[A-Za-z0-9+=_]{32,}"
)


def variables_that_matter(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that decide speed or numbers, by name. A name that speaks of a secret is left out, a value is withheld."""
    return {
        name: WITHHELD if _SECRET_VALUE.search(value) else value
        for name, value in sorted(environ.items())
        if (name.startswith(_PREFIXES) or name in _NAMES) and not _names_a_secret(name)
    }


def _names_a_secret(name: str) -> bool:
    capitals = name.upper()
    return bool(_SECRET_WORDS & set(capitals.split("_"))) or any(part in capitals for part in _SECRET_PARTS)
