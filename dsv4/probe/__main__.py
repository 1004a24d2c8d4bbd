# SPDX-License-Identifier: Apache-2.0
"""`python -m dsv4.probe`: reads a question (`dsv4.planning.recipe.question`) from stdin, writes the
answer as one line of JSON.
"""

from __future__ import annotations

import os
import sys

from dsv4.planning.recipe.question import EngineAnswer, read_question, to_json
from dsv4.probe.engine import EngineProbe


def main() -> None:
    """Answer the question on stdin; engines print to stdout while importing, so that goes to stderr
    meanwhile.
    """
    question = read_question(sys.stdin.read())
    answer_to = os.dup(1)
    os.dup2(2, 1)
    # Without a GPU vLLM cannot even build its parser unless told that this is a CPU.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    engine = _engine(question.engine)
    answer = EngineAnswer(version=engine.version, cases={case.id: engine.answer(case) for case in question.cases})
    with os.fdopen(answer_to, "w") as out:
        out.write(to_json(answer) + "\n")


def _engine(name: str) -> EngineProbe:
    # Each module is needed by its own engine alone.
    if name == "vllm":
        from dsv4.probe.vllm import VllmProbe

        return VllmProbe()
    from dsv4.probe.sglang import SglangProbe

    return SglangProbe()


if __name__ == "__main__":
    main()
