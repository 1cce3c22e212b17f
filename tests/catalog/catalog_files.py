"""The content of the files in the catalog of the tests."""

import json

ROWS = b"".join(
    json.dumps({"instruction": f"say {n}", "output": f"{n}", "part": "ab"[n % 2]}).encode() + b"\n"
    for n in range(20)
)
PROBLEMS = b'[{"original_text": "1 + 1 ?", "equation": "X=1+1", "ans": 2.0}]'
SOLVED = json.dumps(
    [{"instruction": "1 + 1 ?", "input": "", "output": "X=1+1. The answer is 2.0.", "answer": "2.0"}],
    indent=1,
).encode()
