"""Batched prediction against one row at a time, without cache and without padding."""

import random

import pytest
import torch
from evaluation_models import CHARACTERS, make_model

from braidlora.errors import ConfigError, TrainingError
from braidlora.evaluation import predict

PAD, EOS = 0, 2


def random_prompts(
    count: int, longest: int = 40, vocabulary: int = len(CHARACTERS), first: int = 6
) -> list[list[int]]:
    draw = random.Random(5)
    return [
        [1] + [draw.randrange(first, first + vocabulary) for _ in range(draw.randrange(longest))]
        for _ in range(count)
    ]


def greedy(model, prompt: list[int], steps: int, ends: set[int]) -> list[int]:
    """The definition: the whole sequence through the model for every token."""
    ids, new = list(prompt), []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
        ids.append(token)
    return new


def answers(pairs) -> list:
    found = dict(pairs)
    assert sorted(found) == list(range(len(found)))
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generate_gives_every_row_what_it_gives_alone(architecture, tokenizer):
    model, prompts = make_model(architecture), random_prompts(33)
    expected = [
        tokenizer.decode(greedy(model, prompt, 9, {EOS}), skip_special_tokens=True).strip()
        for prompt in prompts
    ]
    assert len(set(expected)) > 20, "the outputs must differ for this test to say anything"
    for batch_size in (1, 5, 32):
        options = {"max_new_tokens": 9, "batch_size": batch_size}
        assert answers(predict.generate(model, tokenizer, prompts, **options)) == expected, batch_size


def test_generate_on_a_pretrained_model(stories):
    model, tokenizer = stories
    texts = ["Once upon a time", "Lily had a", "The big dog ran to the park and", "One day"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    expected = [tokenizer.decode(greedy(model, prompt, 24, {1})).strip() for prompt in prompts]
    for batch_size in (1, 4):
        options = {"max_new_tokens": 24, "batch_size": batch_size}
        assert answers(predict.generate(model, tokenizer, prompts, **options)) == expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_beam_search_does_not_depend_on_the_batch(architecture, tokenizer):
    model, prompts = make_model(architecture), random_prompts(9)
    alone = answers(predict.generate(model, tokenizer, prompts, max_new_tokens=6, num_beams=4, batch_size=1))
    together = answers(
        predict.generate(model, tokenizer, prompts, max_new_tokens=6, num_beams=4, batch_size=9)
    )
    assert alone == together
    assert alone != answers(predict.generate(model, tokenizer, prompts, max_new_tokens=6))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_do_not_depend_on_the_batch(kind, tokenizer):
    import peft

    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, prompts = peft.get_peft_model(make_model("llama"), config).eval(), random_prompts(17, longest=8)
    options = {"max_new_tokens": 6}
    alone = answers(predict.generate(model, tokenizer, prompts, batch_size=1, **options))
    assert answers(predict.generate(model, tokenizer, prompts, batch_size=17, **options)) == alone


def test_an_answer_ends_at_the_first_end_token_of_tokenizer_or_model(tokenizer):
    model, prompts = make_model("llama"), random_prompts(12)
    free = [greedy(model, prompt, 9, {EOS}) for prompt in prompts]
    # Make a token that greedy decoding meets early another end token of the model, as chat models have.
    end = max(range(6, 70), key=lambda token: sum(token in row[1:6] for row in free))
    model.generation_config.eos_token_id = [EOS, end]
    cut = [greedy(model, prompt, 9, {EOS, end}) for prompt in prompts]
    assert cut != free
    got = answers(predict.generate(model, tokenizer, prompts, max_new_tokens=9, batch_size=12))
    assert got == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]


def test_the_models_own_generation_settings_are_set_aside_and_put_back(tokenizer):
    model, prompts = make_model("llama"), random_prompts(8)
    plain = answers(predict.generate(model, tokenizer, prompts, max_new_tokens=8))
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.max_length = True, 5.0, 3.0, 3
    assert answers(predict.generate(model, tokenizer, prompts, max_new_tokens=8)) == plain
    assert model.generation_config is own


def test_dropout_is_off_and_every_modules_mode_comes_back(tokenizer):
    model, prompts = make_model("llama", attention_dropout=0.9), random_prompts(8)
    calm = answers(predict.generate(model, tokenizer, prompts, max_new_tokens=8))
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert answers(predict.generate(model, tokenizer, prompts, max_new_tokens=8)) == calm
    assert [module.training for module in model.modules()] == modes


def test_without_an_end_token_generation_is_refused(tokenizer):
    import copy

    model, without = make_model("llama"), copy.deepcopy(tokenizer)
    without.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="end token"):
        list(predict.generate(model, without, [[1, 7]], max_new_tokens=2))


OPTIONS = [[7, 8, EOS], [7, EOS], [9, 10, 11, 12, EOS], [20, EOS], [30, 31, EOS]]


def log_likelihood(model, prompt: list[int], option: list[int]) -> float:
    """The definition: one sequence at a time, summed over the option's tokens."""
    ids = prompt + option
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(option))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rank_gives_the_likelihood_of_every_option(architecture, batch_size):
    model, prompts = make_model(architecture), random_prompts(7)
    expected = torch.tensor(
        [[log_likelihood(model, prompt, option) for option in OPTIONS] for prompt in prompts]
    )
    options = {"pad_token_id": PAD, "batch_size": batch_size}
    summed = torch.tensor(answers(predict.rank(model, prompts, OPTIONS, length_normalized=False, **options)))
    torch.testing.assert_close(summed, expected, atol=2e-4, rtol=0)
    mean = torch.tensor(answers(predict.rank(model, prompts, OPTIONS, **options)))
    lengths = torch.tensor([len(option) for option in OPTIONS])
    torch.testing.assert_close(mean, expected / lengths, atol=2e-4, rtol=0)


def test_rank_of_options_of_one_token_each():
    model, prompts, options = make_model("llama"), random_prompts(3), [[7], [8]]
    expected = torch.tensor(
        [[log_likelihood(model, prompt, option) for option in options] for prompt in prompts]
    )
    got = torch.tensor(answers(predict.rank(model, prompts, options, pad_token_id=PAD)))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


def test_rank_works_through_an_adapter():
    import peft

    from braidlora import MultiLoraConfig

    prompts = random_prompts(5)
    config = MultiLoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    model = peft.get_peft_model(make_model("llama"), config).eval()
    expected = torch.tensor(
        [[log_likelihood(model, prompt, option) for option in OPTIONS] for prompt in prompts]
    )
    got = answers(predict.rank(model, prompts, OPTIONS, pad_token_id=PAD, length_normalized=False))
    torch.testing.assert_close(torch.tensor(got), expected, atol=2e-4, rtol=0)
    with model.disable_adapter():
        without = answers(predict.rank(model, prompts, OPTIONS, pad_token_id=PAD, length_normalized=False))
    assert not torch.allclose(torch.tensor(without), expected, atol=1e-2)


@pytest.mark.parametrize("options", [[], [[7], []]])
def test_rank_refuses_empty_options(options):
    with pytest.raises(ValueError, match="empty option"):
        list(predict.rank(make_model("llama"), [[1]], options, pad_token_id=PAD))


@pytest.mark.parametrize("architecture", ["bert", "llama-classifier"])
def test_classify_chooses_among_the_tasks_own_labels(architecture):
    model, texts = make_model(architecture), random_prompts(17)
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([text])).logits for text in texts])
    free = answers(predict.classify(model, texts, torch.ones(5, dtype=torch.bool), pad_token_id=PAD))
    assert free == logits.argmax(-1).tolist()
    allowed = torch.tensor([False, True, False, True, False])
    expected = [1 if row[1] >= row[3] else 3 for row in logits]
    assert free != expected
    for batch_size in (1, 17):
        options = {"pad_token_id": PAD, "batch_size": batch_size}
        assert answers(predict.classify(model, texts, allowed, **options)) == expected


def test_a_model_that_gives_nan_is_an_error():
    model, classifier = make_model("llama"), make_model("bert")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
        classifier.classifier.bias[0] = torch.nan
    with pytest.raises(TrainingError, match="NaN"):
        list(predict.rank(model, [[1, 7]], OPTIONS, pad_token_id=PAD))
    with pytest.raises(TrainingError, match="NaN"):
        list(predict.classify(classifier, [[1, 7]], torch.ones(5, dtype=torch.bool), pad_token_id=PAD))


def test_running_out_of_memory_names_the_remedy(tokenizer, monkeypatch):
    model = make_model("llama")

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", no_memory)
    model.train()
    with pytest.raises(TrainingError, match=r"evaluation\.batch_size"):
        list(predict.generate(model, tokenizer, [[1, 7]], max_new_tokens=2))
    assert model.training
