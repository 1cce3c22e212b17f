"""Tasks: rows → prompts → token batches. A task has a name, rows, a prompt template and a metric.

Called by `training`, `evaluation`, `comparison`, `federated.site`, `analysis`, `plan` and `cli`; imports `config` and
`runs`.
"""

from braidlora.tasks._task import PARTS, Counts, Part, Row, Task
from braidlora.tasks.card import adapter_card, task_of_card
from braidlora.tasks.collate import Collator, pad
from braidlora.tasks.dataset import EncodedCounts, MultiTaskDataset, encode_tasks
from braidlora.tasks.encode import (
    IGNORED,
    Encoded,
    encode_answer,
    encode_examples,
    encode_prompt,
    encode_texts,
    written_answers,
)
from braidlora.tasks.labels import LabelSpace
from braidlora.tasks.load import check_chat_settings, load_tasks
from braidlora.tasks.mixing import MixingSampler, mixing_probabilities
from braidlora.tasks.options import option_texts
from braidlora.tasks.packing import check_packing
from braidlora.tasks.report import data_report, fingerprint, fingerprints, read_lines, size_line
from braidlora.tasks.templates import Template, get_template
