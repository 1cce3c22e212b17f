"""The code of the model card ranks where the recipe ranks: with a format string, a chat template, and other tasks."""

import re
import warnings

import pytest

import braidlora
from braidlora.config import RunConfig

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("template", ["{instruction} =", "chat"])
@pytest.mark.parametrize("tasks", [("mood",), ("mood", "sum")], ids="+".join)
def test_the_code_of_a_task_with_options_ranks_them(tasks, template, normalized, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT)
    options = {"mode": "rank", "options": ["positive", "negative"], "metric": "accuracy"}
    recipe = {
        "model": {
            "path": "embedded",
            **({"chat_template": str(tmp_path / "chat.jinja")} if template == "chat" else {}),
        },
        "adapter": {"method": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "tasks": [
            {
                "name": name,
                "train": {"source": f"generated:{name}", "limit": 16},
                **(options if name == "mood" else {}),
            }
            for name in tasks
        ],
        "prompt": {"template": template, "cutoff": 96},
        "evaluation": {"max_new_tokens": 4, "length_normalized": normalized},
        "training": {"max_steps": 2, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0},
        "output": str(tmp_path / "run"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = braidlora.train(RunConfig.model_validate(recipe), progress=False).directory
        model = braidlora.load(run)
        (code,) = re.findall(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), flags=re.S)
        code = code.replace("PATH_OF_THIS_FOLDER", str(run / "adapter"))
        for number, task in enumerate(tasks):
            for text in ("not bad at all", "a sad and slow film"):
                found: dict = {}
                exec(
                    code.replace("YOUR INSTRUCTION", text).replace('["tasks"][0]', f'["tasks"][{number}]'),
                    found,
                )
                (expected,) = model.predict(text, task)
                assert found["answer"] == expected["prediction"]
                if task == "mood":
                    shares = dict(zip(options["options"], found["scores"].softmax(-1).tolist(), strict=True))
                    assert shares == pytest.approx(expected["probabilities"], abs=1e-5)
