"""The torch decoder against the reference model's recorded tensors, and at sizes of our own."""

import numpy as np
import pytest
import torch

from networks import TorchEngine, load_chatglm
from reference import load_json, positions, tensors
from seechat_export.reference_chatglm import ChatGLM, prefix_mask
from seechat_lite.prompt import Prompt, context_length
from seechat_weights.config import ALPHA, LMConfig

TOLERANCE = 5e-4
CASES = ["p0", "p1", "p2", "p3_mask", "p4_continue", "p5_both", "p6_infill", "p7_len1", "p8_long"]


def all_logits(model: ChatGLM, embeds: np.ndarray, ids: list[int]) -> np.ndarray:
    """Logits of all positions [len, vocab] by one masked forward."""
    context = context_length(ids, bos_id=model.config.bos_id)
    mask = prefix_mask(torch.tensor([context]), len(ids))
    position = torch.from_numpy(positions(ids, model.config))
    return model(torch.from_numpy(embeds)[None], position[None], mask=mask)[0].numpy()


def embed(model: ChatGLM, ids: list[int]) -> np.ndarray:
    return model.word_embeddings.weight.numpy()[ids]


@pytest.mark.parametrize("name", CASES)
def test_reference_case(chatglm_tiny: ChatGLM, name: str) -> None:
    case = tensors(f"chatglm_tiny/case_{name}.safetensors")
    ids = case["input_ids"][0].tolist()
    np.testing.assert_array_equal(positions(ids, chatglm_tiny.config), case["position_ids"][0])
    context = context_length(ids, bos_id=chatglm_tiny.config.bos_id)
    mask = prefix_mask(torch.tensor([context]), len(ids)).numpy()
    np.testing.assert_array_equal(mask, case["attention_mask"] == 0)

    logits = all_logits(chatglm_tiny, embed(chatglm_tiny, ids), ids)
    if "logits" in case:
        np.testing.assert_allclose(logits, case["logits"][0], rtol=0, atol=TOLERANCE)
    else:
        np.testing.assert_allclose(logits[-1], case["logits_last"][0], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(logits.argmax(-1), case["logits_argmax"][0])

    # the runtime's way: the context without a mask, then token by token over the cache
    engine = TorchEngine(chatglm_tiny)
    step_logits = [engine.prefill(Prompt(ids))]
    np.testing.assert_allclose(step_logits[0], logits[-1], rtol=0, atol=TOLERANCE)
    for token in load_json("chatglm_tiny/cases.json")["cases"][name]["greedy"][:5]:
        step_logits.append(engine.step(token))
    np.testing.assert_allclose(step_logits, case["greedy_step_logits"], rtol=0, atol=TOLERANCE)


def test_pictures_as_embeddings(chatglm_tiny: ChatGLM) -> None:
    case = tensors("chatglm_tiny/case_seechat_embeds.safetensors")
    ids = case["input_ids"][0].tolist()
    start, image = ids.index(0), case["image_embeds"][0]
    embeds = embed(chatglm_tiny, ids).copy()
    embeds[start : start + len(image)] = image
    np.testing.assert_array_equal(embeds, case["inputs_embeds"][0])
    logits = all_logits(chatglm_tiny, embeds, ids)
    np.testing.assert_allclose(logits, case["logits"][0], rtol=0, atol=TOLERANCE)

    engine = TorchEngine(chatglm_tiny)
    step_logits = [engine.prefill(Prompt(ids, [(start, image)]))]
    for token in load_json("chatglm_tiny/cases.json")["cases"]["seechat_embeds"]["greedy"][:5]:
        step_logits.append(engine.step(token))
    np.testing.assert_allclose(step_logits, case["greedy_step_logits"], rtol=0, atol=TOLERANCE)


def test_cache_holds_the_published_keys_and_values(chatglm_tiny: ChatGLM) -> None:
    case = tensors("chatglm_tiny/case_p1_kv.safetensors")
    ids = tensors("chatglm_tiny/case_p1.safetensors")["input_ids"][0].tolist()
    engine = TorchEngine(chatglm_tiny)

    def check(stage: str) -> None:
        assert engine.cache is not None
        for layer in range(chatglm_tiny.config.num_layers):
            for kind, ours in (("key", engine.cache.keys), ("value", engine.cache.values)):
                published = case[f"{stage}.past.{layer}.{kind}"]  # [length, batch, heads, head]
                kept = ours[layer][:, :, : engine.cache.length].permute(2, 0, 1, 3)
                np.testing.assert_allclose(kept, published, rtol=0, atol=TOLERANCE)

    engine.prefill(Prompt(ids))
    check("prefill")
    for i, token in enumerate(case["decode_fed_ids"].tolist()):
        logits = engine.step(token)
        np.testing.assert_array_equal(engine.position[:, 0], case["decode_position_ids"][i])
        np.testing.assert_allclose(logits, case["decode_logits"][i], rtol=0, atol=TOLERANCE)
    check("decode4")


@pytest.mark.parametrize("layer", [0, 2])
def test_inside_a_layer(chatglm_tiny: ChatGLM, layer: int) -> None:
    """Where a difference would first show: hidden states, and the parts of a layer."""
    case = tensors("chatglm_tiny/case_p1.safetensors")
    ids = case["input_ids"][0].tolist()
    context = context_length(ids, bos_id=chatglm_tiny.config.bos_id)
    block, seen = chatglm_tiny.layers[layer], {}
    parts = {
        "attention_input": block.input_layernorm,
        "qkv": block.attention.query_key_value,
        "attn_out": block.attention.dense,
        "mlp_input": block.post_attention_layernorm,
        "mlp_h4": block.mlp.dense_h_to_4h,
        "mlp_out": block.mlp.dense_4h_to_h,
        "block_out": block,
    }

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: object, _args: object, output: torch.Tensor) -> None:
            seen[name] = output[0].numpy()

        return parts[name].register_forward_hook(hook)

    hooks = [keep(name) for name in parts]
    try:
        states = chatglm_tiny.hidden_states(
            torch.from_numpy(embed(chatglm_tiny, ids))[None],
            torch.from_numpy(positions(ids, chatglm_tiny.config))[None],
            mask=prefix_mask(torch.tensor([context]), len(ids)),
        )
    finally:
        for hook in hooks:
            hook.remove()
    for i, state in enumerate(states):
        expected = case[f"hidden_states.{i}"][:, 0]
        np.testing.assert_allclose(state[0], expected, rtol=0, atol=TOLERANCE)
    for name, value in seen.items():
        expected = case[f"layer.{layer}.{name}"][:, 0]
        np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE, err_msg=name)


def test_28_layers() -> None:
    """Deep enough that sqrt(2 * layers) and sqrt(2 * 28) are the same, and errors would add up."""
    model = load_chatglm("chatglm_tiny28")
    for name, recorded in load_json("chatglm_tiny28/cases.json")["cases"].items():
        case = tensors(f"chatglm_tiny28/case_{name}.safetensors")
        ids = case["input_ids"][0].tolist()
        logits = all_logits(model, embed(model, ids), ids)
        np.testing.assert_allclose(logits[-1], case["logits_last"][0], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(logits.argmax(-1), case["logits_argmax"][0])

        engine = TorchEngine(model)
        logits, greedy = engine.prefill(Prompt(ids)), []
        for _ in recorded["greedy"]:
            greedy.append(int(logits.argmax()))
            logits = engine.step(greedy[-1])
        assert greedy == recorded["greedy"]


def plain_logits(model: ChatGLM, ids: list[int]) -> np.ndarray:
    """Logits of all positions, in double precision and one head at a time, from the formulas alone.

    The query is divided by (layer + 1) and the scores multiplied by it, as published.
    """
    config, w = model.config, {k: v.double().numpy() for k, v in model.state_dict().items()}
    head, half = config.head_size, config.head_size // 2
    position, length = positions(ids, config), len(ids)
    context = context_length(ids, bos_id=config.bos_id)
    visible = np.tril(np.ones((length, length), bool)) | (np.arange(length) < context)
    frequency = (10000.0 ** (-np.arange(0, half, 2, dtype=np.float32) / half)).astype(np.float16)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / np.sqrt(var + config.layernorm_epsilon)
        return normed * w[name + ".weight"] + w[name + ".bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def rotate(x: np.ndarray) -> np.ndarray:
        parts = []
        for row in (0, 1):
            part = x[:, row * half : (row + 1) * half]
            angle = np.tile(position[row][:, None] * frequency.astype(np.float64), 2)
            turned = np.concatenate([-part[:, half // 2 :], part[:, : half // 2]], -1)
            parts.append(part * np.cos(angle) + turned * np.sin(angle))
        return np.concatenate(parts, -1)

    x = w["word_embeddings.weight"][ids]
    for i in range(config.num_layers):
        name = f"layers.{i}"
        x = norm(x, f"{name}.input_layernorm")
        qkv = linear(x, f"{name}.attention.query_key_value")
        heads = []
        for h in range(config.num_heads):
            q, k, v = np.split(qkv[:, 3 * head * h : 3 * head * (h + 1)], 3, -1)
            attention = rotate(q) / (np.sqrt(head) * (i + 1)) @ rotate(k).T * (i + 1)
            attention = np.exp(np.where(visible, attention, -10000.0))
            heads.append(attention / attention.sum(-1, keepdims=True) @ v)
        attended = linear(np.concatenate(heads, -1), f"{name}.attention.dense")
        x = norm(x * ALPHA + attended, f"{name}.post_attention_layernorm")
        y = linear(x, f"{name}.mlp.dense_h_to_4h")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x * ALPHA + linear(y, f"{name}.mlp.dense_4h_to_h")
    return norm(x, "final_layernorm") @ w["lm_head.weight"].T


def test_the_formulas_reproduce_the_reference(chatglm_tiny: ChatGLM) -> None:
    case = tensors("chatglm_tiny/case_p6_infill.safetensors")
    logits = plain_logits(chatglm_tiny, case["input_ids"][0].tolist())
    np.testing.assert_allclose(logits[-1], case["logits_last"][0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("hidden", "heads", "layers", "inner"),
    [(60, 5, 2, 100), (72, 3, 1, 288), (160, 2, 4, 96), (12, 3, 3, 7), (4, 1, 1, 1)],
)
def test_other_sizes(hidden: int, heads: int, layers: int, inner: int) -> None:
    config = LMConfig(
        vocab_size=97,
        hidden_size=hidden,
        num_heads=heads,
        num_layers=layers,
        inner_size=inner,
        max_sequence_length=64,
        mask_id=90,
        gmask_id=91,
        bos_id=94,
        eos_id=95,
    )
    torch.manual_seed(hidden)
    model = ChatGLM(config).eval().requires_grad_(False)
    ids = [*np.random.default_rng(0).integers(0, 90, 20).tolist(), 91, 94, 7, 8, 9]
    expected = plain_logits(model, ids)
    logits = all_logits(model, embed(model, ids), ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        TorchEngine(model).prefill(Prompt(ids)), expected[-1], rtol=0, atol=TOLERANCE
    )


def test_batches_of_different_lengths(chatglm_tiny: ChatGLM) -> None:
    """Rows padded on the right give each row's own logits."""
    rows = [
        tensors(f"chatglm_tiny/case_{name}.safetensors")["input_ids"][0].tolist()
        for name in ("p0", "p6_infill", "p2")
    ]
    config, longest = chatglm_tiny.config, max(map(len, rows))
    ids = torch.full((len(rows), longest), config.pad_id)
    position = torch.zeros((len(rows), 2, longest), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        position[i, :, : len(row)] = torch.from_numpy(positions(row, config))
    contexts = torch.tensor([context_length(row, bos_id=config.bos_id) for row in rows])
    logits = chatglm_tiny(
        chatglm_tiny.word_embeddings(ids), position, mask=prefix_mask(contexts, longest)
    )
    for i, row in enumerate(rows):
        alone = all_logits(chatglm_tiny, embed(chatglm_tiny, row), row)
        np.testing.assert_allclose(logits[i, : len(row)], alone, rtol=0, atol=TOLERANCE)
