"""The authors' released forward pass, restated in plain PyTorch, and ours with its weights mapped over: equal to rounding.

It needs a fixed scale of 539.9738 for P and a seventh of it for I, which is an MLP of a trained vector; vectors that are
CLS and of length 1; and temperature 1. Mapped are r = 539.9738 / config.scale times the projector's output layer, and
MLP(instruction) / 7 * r for the instruction.
"""

import copy

import pytest
import tiny
import torch
from reference import close
from torch import nn
from torch.nn import functional as F

from pplug_hf import PPlugProcessor

SCALE, PROMPT = 539.9738, "find a good "
HISTORIES = [tiny.HISTORY, tiny.HISTORY[1:3], ["winter"]]
QUERIES = ["the night sky", "a good film", "snow"]


def mlp(width, middle, out):
    return nn.Sequential(nn.Linear(width, middle), nn.GELU(), nn.Linear(middle, out))


class Release(nn.Module):
    """[I ; P ; x] as the authors' code computes it."""

    def __init__(self, language_model, encoder, width, middle, out):
        super().__init__()
        self.language_model = language_model.requires_grad_(False)
        self.history_encoder = encoder.requires_grad_(False)
        self.input_encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.project, self.project_instruction = mlp(width, middle, out), mlp(width, middle, out)
        self.instruction = nn.Parameter(torch.randn(width))

    def embed(self, encoder, texts):
        batch = tiny.tokenizer("encoder")(texts, padding=True, return_tensors="pt")
        return F.normalize(encoder(**batch).last_hidden_state[:, 0], dim=-1)  # CLS, L2

    def weights(self, query, history):
        self.items = self.embed(self.history_encoder, history)  # [N, D]
        return (self.embed(self.input_encoder, [PROMPT + query]) @ self.items.T).softmax(dim=-1)  # [1, N]

    def persona(self, query, history):
        return self.weights(query, history) @ self.project(self.items) * SCALE  # [1, H]

    def inputs(self, input_ids, attention_mask, queries, histories):
        personas = torch.stack([self.persona(*row) for row in zip(queries, histories, strict=True)])  # [B, 1, H]
        instruction = self.project_instruction(self.instruction) * SCALE / 7
        words = self.language_model.get_input_embeddings()(input_ids)  # [B, T, H]
        embeds = torch.cat([instruction.expand(len(words), 1, -1), personas, words], dim=1)
        mask = torch.cat([attention_mask.new_ones(len(words), 2), attention_mask], dim=1)
        return {"inputs_embeds": embeds, "attention_mask": mask}


@pytest.fixture(params=["t5", "flan-t5"])
def both(request):
    """The release, our model with its weights, and r."""
    choices = {"num_persona_tokens": 1, "attention_temperature": 1.0, "train_input_encoder": True}
    ours = tiny.model(request.param, query_prompt=PROMPT, history_prompt="", **choices)
    plug, config = ours.plug, ours.config
    torch.manual_seed(1)
    width, middle, out, _ = config.sizes  # D, M, H
    release = Release(copy.deepcopy(ours.backbone), tiny.encoder()[0].auto_model, width, middle, out).eval()
    r = SCALE / config.scale
    with torch.no_grad():
        plug.projector.hidden.load_state_dict(release.project[0].state_dict())
        plug.projector.output.weight.copy_(release.project[2].weight * r)
        plug.projector.output.bias.copy_(release.project[2].bias * r)
        plug.instruction.copy_(release.project_instruction(release.instruction) / 7 * r)
        plug.input_encoder[0].auto_model.load_state_dict(release.input_encoder.state_dict())
    return release, ours.eval(), r


def test_our_forward_pass_with_the_releases_weights_is_the_releases(both):
    release, ours, r = both
    processor = PPlugProcessor.from_model(ours)
    batch = processor(text=tiny.PROMPTS, labels=tiny.ANSWERS, persona=HISTORIES, query=QUERIES)
    inputs = release.inputs(batch["input_ids"], batch["attention_mask"], QUERIES, HISTORIES)
    theirs = release.language_model(**inputs, labels=batch["labels"])
    made = ours(**batch)
    close(made.logits, theirs.logits)
    close(made.loss, theirs.loss)
    with torch.no_grad():
        personas = [ours.encode_persona(history) for history in HISTORIES]
        weights = ours.persona_weights(personas, query=QUERIES)
        for row, (query, history) in enumerate(zip(QUERIES, HISTORIES, strict=True)):
            close(weights[row][: len(history)], release.weights(query, history)[0], 1e-6)
        queries = ours.plug.input_encoder.encode([PROMPT + query for query in QUERIES], convert_to_tensor=True)
        P = ours.plug.persona_embedding(queries, [persona.vectors for persona in personas])
        close(P[:, 0], torch.cat([release.persona(*row) for row in zip(QUERIES, HISTORIES, strict=True)]))
        for beams in (1, 4):
            options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
            assert torch.equal(
                ours.generate(**{name: value for name, value in batch.items() if name != "labels"}, **options),
                release.language_model.generate(**inputs, **options),
            )

    made.loss.backward()
    theirs.loss.backward()
    plug = ours.plug
    for mine, their, factor in (
        (plug.projector.hidden.weight, release.project[0].weight, 1),
        (plug.projector.hidden.bias, release.project[0].bias, 1),
        (plug.projector.output.weight, release.project[2].weight, r),
        (plug.projector.output.bias, release.project[2].bias, r),
        (plug.instruction, release.project_instruction[2].bias, r / 7),
    ):
        assert their.grad.abs().max() > 0
        close(mine.grad * factor, their.grad, 1e-3)
    their_encoder = dict(release.input_encoder.named_parameters())
    for name, mine in plug.input_encoder[0].auto_model.named_parameters():
        if "pooler" not in name:
            close(mine.grad, their_encoder[name].grad, 1e-3)
    assert all(parameter.grad is None for parameter in ours.backbone.parameters())
