"""Sessions of onnxruntime, for graphs in files. No torch here."""

from importlib import import_module
from pathlib import Path
from typing import Any

RUNTIME = "onnxruntime"


def open_session(path: Path, threads: int, *, waits: bool = False) -> Any:
    """The session for the graph in a file, with so many threads; 0 leaves the number to onnxruntime.

    Threads that have nothing to do are busy all the same, which is fastest, unless each one `waits`.

    Raises ImportError without onnxruntime, and what onnxruntime raises for a file that is no graph.
    """
    runtime = import_module(RUNTIME)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # memory is given back: batches differ in size
    options.log_severity_level = 3  # errors
    if waits:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
