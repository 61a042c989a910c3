"""Equations 1 to 6 the slow way: one user, one item, one token at a time, no padding, no cache.

Nothing here shares code with the package. Shapes are lists; numbers of the plug are double precision.
"""

import math

import torch


def close(got, expected, tolerance=1e-4):
    """Equal to rounding of single precision."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def unit(vector):
    return vector / math.sqrt(sum(v * v for v in vector.tolist()))


def gelu(vector):
    return torch.stack([v * 0.5 * (1 + torch.erf(v / math.sqrt(2))) for v in vector])


def word_table(backbone):
    """The module that the backbone itself embeds a prompt with; BART's encoder has one of its own if untied."""
    return (
        backbone.model.encoder.embed_tokens
        if backbone.config.model_type == "bart"
        else backbone.get_input_embeddings()
    )


def scale(backbone):
    """Root mean square component of the token embeddings, padding row of zeros left out."""
    table = word_table(backbone)
    rows = [row * getattr(table, "embed_scale", 1.0) for row in table.weight.detach().double()]
    norms = [norm for norm in (math.sqrt((row * row).sum()) for row in rows) if norm > 0]
    return sum(norms) / len(norms) / math.sqrt(table.weight.shape[1])


# ---- equations 3 to 5, on the vectors of one user ---------------------------------------------------------------


def weights(plug, query, items):
    """Equation (3)."""
    if plug.config.aggregator == "mean":
        return [1 / len(items)] * len(items)
    temperature = plug.config.attention_temperature
    if plug.config.learn_temperature:
        temperature = math.exp(plug.aggregator.log_temperature.item())
    scores = [math.exp(torch.dot(unit(query), unit(item)).item() / temperature) for item in items]
    return [score / sum(scores) for score in scores]


def persona_embedding(plug, query, items):
    """Equation (4) as it stands: every item goes through the whole projector. [K, H], in units of `scale`."""
    W1, b1, W2, b2 = (p.double() for p in plug.projector.parameters())
    if not len(items):
        P = plug.no_persona.double()
        if plug.config.project_no_persona:
            D = W1.shape[1]
            P = P + (W2 @ gelu(W1 @ torch.full((D,), D**-0.5, dtype=torch.double) + b1) + b2).view(P.shape)
        return P
    total = 0
    for weight, item in zip(weights(plug, query, items), items, strict=True):
        total = total + weight * (W2 @ gelu(W1 @ unit(item) + b1) + b2)
    return total.view(plug.no_persona.shape)


def prefix(plug, query, items):
    """The right-hand side of equation (5) without the words, in units of `scale`."""
    persona = persona_embedding(plug, query, items)
    return persona if plug.instruction is None else torch.cat([plug.instruction.double()[None], persona])


# ---- the whole model, one row -----------------------------------------------------------------------------------


@torch.no_grad()
def read(model, history, query):
    """Equations (1) and (2): the vectors of the items and of the request."""
    ask = model.plug.input_encoder or model.history_encoder
    items = [torch.tensor(model.history_encoder.encode(model.config.history_prompt + text)) for text in history]
    return torch.tensor(ask.encode(model.config.query_prompt + query)).double(), [item.double() for item in items]


@torch.no_grad()
def soft_prompt(model, history, query):
    """[P, H]"""
    return (scale(model.backbone) * prefix(model.plug, *read(model, history, query))).float()


def row(model, prompt):
    """Token ids of a prompt, as a user gets them."""
    return model.tokenizer(prompt)["input_ids"]


@torch.no_grad()
def next_logits(model, soft, prompt_ids, answer_ids, position=None):
    """Logits of the token behind `answer_ids`, from the backbone's forward alone.

    `position` tokens stand in front of the soft prompt: if not told otherwise, a causal model's BOS, else none.
    """
    backbone, table = model.backbone, word_table(model.backbone)

    def words(ids):
        return table.weight[torch.tensor(ids, dtype=torch.long)] * getattr(table, "embed_scale", 1.0)

    if backbone.config.is_encoder_decoder:
        decoder = [backbone.config.decoder_start_token_id, *answer_ids]
        source = torch.cat([words(prompt_ids[: position or 0]), soft, words(prompt_ids[position or 0 :])])
        return backbone(inputs_embeds=source[None], decoder_input_ids=torch.tensor([decoder])).logits[0, -1]
    if position is None:
        position = int(prompt_ids[:1] == [backbone.config.bos_token_id])
    source = torch.cat([words(prompt_ids[:position]), soft, words([*prompt_ids[position:], *answer_ids])])
    return backbone(inputs_embeds=source[None], use_cache=False).logits[0, -1]


def log_likelihood(model, soft, prompt_ids, answer_ids, position=None):
    """Log-probability of every token of an answer (equation 6)."""
    return [
        next_logits(model, soft, prompt_ids, answer_ids[:t], position).log_softmax(-1)[token].item()
        for t, token in enumerate(answer_ids)
    ]


# ---- decoding; `step` gives the logits behind the tokens so far -------------------------------------------------


def greedy(step, length, eos, rule=lambda answer, logits: logits):
    """At most `length` tokens. `rule` changes the logits, as a logits processor does."""
    answer = []
    while len(answer) < length and answer[-1:] != [eos]:
        answer.append(rule(answer, step(answer)).argmax().item())
    return answer


def sample(step, length, eos, temperature):
    answer = []
    while len(answer) < length and answer[-1:] != [eos]:
        answer.append(torch.multinomial((step(answer) / temperature).softmax(-1), 1).item())
    return answer


def beam(step, length, eos, beams):
    """The best `beams` answers of exactly `length` tokens (EOS is forbidden), best first."""
    best = [(0.0, [])]
    for _ in range(length):
        longer = []
        for score, answer in best:
            logs = step(answer).log_softmax(-1).tolist()
            longer += [(score + log, [*answer, token]) for token, log in enumerate(logs) if token != eos]
        best = sorted(longer, key=lambda pair: pair[0], reverse=True)[:beams]
    return [answer for _, answer in best]


# ---- retrieval --------------------------------------------------------------------------------------------------


def okapi(documents, query, k1=1.5, b=0.75, epsilon=0.25):
    """The benchmark's BM25, one document and one word at a time. Lists of words to a score per document."""

    def idf(word):
        n = sum(word in document for document in documents)
        return math.log((len(documents) - n + 0.5) / (n + 0.5))

    vocabulary = {word for document in documents for word in document}
    mean_idf = sum(map(idf, vocabulary)) / len(vocabulary) if vocabulary else 0
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0
        for word in query:
            if word in document:
                weight = idf(word) if idf(word) >= 0 else epsilon * mean_idf
                f = document.count(word)
                score += weight * f * (k1 + 1) / (f + k1 * (1 - b + b * len(document) / mean_length))
        scores.append(score)
    return scores
