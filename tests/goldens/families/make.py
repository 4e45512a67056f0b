"""Makes the goldens of the model families in this directory with transformers and PEFT.

    python tests/goldens/families/make.py [NAME ...]        all of them without a name

Each family gets what ../make.py makes for a model: a tiny checkpoint, rows, per-token losses, greedy continuations,
an adapter on all linears with its losses, and two trajectories (12 steps of LoRA, 6 of full fine-tuning). On top,
`gradients.safetensors` holds the gradient of the summed loss of all rows for every weight.
Needs torch, transformers and peft; versions.json has the versions used.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HunYuanDenseV1Config,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpt_oss  # noqa: E402, beside this file
import moe  # noqa: E402

HERE = Path(__file__).resolve().parent


def shared():
    """The functions of ../make.py."""
    spec = importlib.util.spec_from_file_location("goldens_make", HERE.parent / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


base = shared()
SEED = 31_000
NONE = base.NO_SPECIAL_TOKENS
SPLIT = base.SEVEN
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
DELTA = [*SPLIT, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
FUSED_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def longrope(dims, factor, original):
    """Phi-3.5's scaling: one factor a frequency for short and for long sequences."""
    half = dims // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.05 * i for i in range(half)],
        "long_factor": [1.0 + 0.5 * i for i in range(half)],
        "original_max_position_embeddings": original,
        "factor": factor,
    }


def gemma3_text(vocab_size, **more):
    """Windows of 12 tokens in two of three layers, and the linear scaling of the larger checkpoints in the third."""
    return Gemma3TextConfig(**{
        "vocab_size": vocab_size, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24,
        "sliding_window": 12, "sliding_window_pattern": 3, "max_position_embeddings": 256,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": base.rope(1e4),
        },
        **NONE, **more,
    })


def qwen3_5_text(vocab_size, config=Qwen3_5TextConfig, **more):
    """Every third layer has softmax attention; a quarter of each of its heads is rotated.

    The results of a gated delta layer are q·k times a value and more, and some of them are small. With an eps of 1e-6 their
    norm would magnify rounding so that float32 keeps four digits of the gradients.
    """
    return config(**{
        "vocab_size": vocab_size, "hidden_size": 36, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "full_attention_interval": 3,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-2,
        "rope_parameters": {**base.rope(1e6), "partial_rotary_factor": 0.25}, **NONE, **more,
    })


# name: (configuration, target modules)
FAMILIES = {
    # v0.3: no window, as many head channels as hidden_size / heads.
    "mistral": (MistralConfig(
        vocab_size=107, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, sliding_window=None,
        rope_parameters=base.rope(1e6), tie_word_embeddings=False, **NONE,
    ), SPLIT),
    # Nemo and Small: head_dim is not hidden_size / heads.
    "mistral-nemo": (MistralConfig(
        vocab_size=103, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, sliding_window=None,
        rope_parameters=base.rope(1e5), tie_word_embeddings=False, **NONE,
    ), SPLIT),
    # Phi-3: fused qkv_proj and gate_up_proj. The window is longer than any row.
    "phi3": (Phi3Config(
        vocab_size=109, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, original_max_position_embeddings=256, rms_norm_eps=1e-5,
        sliding_window=2047, rope_parameters=base.rope(1e4), tie_word_embeddings=False, **NONE,
    ), FUSED),
    # Phi-3.5: longrope, of which rows this short use the short factors.
    "phi3-longrope": (Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, original_max_position_embeddings=256, rms_norm_eps=1e-5,
        sliding_window=None, rope_parameters=longrope(8, 4.0, 256), tie_word_embeddings=False, **NONE,
    ), FUSED),
    # Phi-4-mini: tied, three quarters of each head are rotated, grouped keys.
    "phi4-mini": (Phi3Config(
        vocab_size=113, hidden_size=48, intermediate_size=60, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=256, original_max_position_embeddings=256, rms_norm_eps=1e-5,
        sliding_window=None, tie_word_embeddings=True, partial_rotary_factor=0.75,
        rope_parameters={**base.rope(1e4), "partial_rotary_factor": 0.75}, **NONE,
    ), FUSED),
    # Every fourth layer has no rotary embedding.
    "smollm3": (SmolLM3Config(
        vocab_size=111, hidden_size=36, intermediate_size=48, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6, no_rope_layer_interval=4,
        use_sliding_window=False, rope_parameters=base.rope(2e6), tie_word_embeddings=True, **NONE,
    ), SPLIT),
    # Multipliers of the embedding, the attention scores, both branches of a block, and the logits.
    "granite": (GraniteConfig(
        vocab_size=101, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        embedding_multiplier=1.8, attention_multiplier=0.2, residual_multiplier=0.85, logits_scaling=0.7,
        rope_parameters=base.rope(1e4), **NONE,
    ), SPLIT),
    # Caps low enough to bend scores and logits, and a window that most rows exceed.
    "gemma2": (Gemma2Config(
        vocab_size=107, hidden_size=40, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=12, attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0, max_position_embeddings=256, rope_parameters=base.rope(1e4), **NONE,
    ), SPLIT),
    "gemma3": (gemma3_text(109), SPLIT),
    # The text part beside a vision tower, which training leaves alone.
    "gemma3-multimodal": (Gemma3Config(
        text_config=gemma3_text(105, num_hidden_layers=3), vision_config=SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8,
        ), mm_tokens_per_image=4, **NONE,
    ), SPLIT),
    # v0.1: a window in every layer.
    "mistral-window": (MistralConfig(
        vocab_size=103, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, sliding_window=12,
        rope_parameters=base.rope(1e4), tie_word_embeddings=False, **NONE,
    ), SPLIT),
    # A window from the second layer on.
    "qwen2-window": (Qwen2Config(
        vocab_size=101, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6, use_sliding_window=True,
        sliding_window=12, max_window_layers=1, rope_parameters=base.rope(1e4), tie_word_embeddings=True, **NONE,
    ), SPLIT),
    # Norms after both halves, and one over all heads of queries and of keys.
    "olmo2": (Olmo2Config(
        vocab_size=99, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=256, rms_norm_eps=1e-6, rope_parameters=base.rope(5e5),
        tie_word_embeddings=False, **NONE,
    ), SPLIT),
    # With windows of 12 in three of four layers, and YaRN in the fourth.
    "olmo3": (Olmo3Config(
        vocab_size=95, hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6, sliding_window=12,
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5,
            },
            "sliding_attention": base.rope(5e5),
        },
        tie_word_embeddings=False, **NONE,
    ), SPLIT),
    # The fourth layer has neither a window nor rotary positions.
    "exaone4": (Exaone4Config(
        vocab_size=93, hidden_size=32, intermediate_size=44, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, sliding_window=12,
        sliding_window_pattern=4, rope_parameters=base.rope(1e6), tie_word_embeddings=False, **NONE,
    ), SPLIT),
    # Half of each head rotated, in interleaved pairs; biases of queries, keys and values; fused gate and up.
    "glm": (GlmConfig(
        vocab_size=91, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, attention_bias=True,
        rope_parameters={**base.rope(1e4), "partial_rotary_factor": 0.5}, tie_word_embeddings=False, **NONE,
    ), FUSED_MLP),
    # The same with norms after both halves, without biases.
    "glm4": (Glm4Config(
        vocab_size=89, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, attention_bias=False,
        rope_parameters={**base.rope(1e4), "partial_rotary_factor": 0.5}, tie_word_embeddings=False, **NONE,
    ), FUSED_MLP),
    # Queries that grow after every 16 positions, beside YaRN.
    "ministral3": (Ministral3Config(
        vocab_size=87, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
        }, tie_word_embeddings=True, **NONE,
    ), SPLIT),
    # Norms of heads after the rotation, and a base of the frequencies raised by alpha.
    "hunyuan": (HunYuanDenseV1Config(
        vocab_size=85, hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4},
        tie_word_embeddings=True, **NONE,
    ), SPLIT),
    # Normalized weights of three of eight experts.
    "qwen3-moe": (Qwen3MoeConfig(
        vocab_size=99, hidden_size=32, intermediate_size=40, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_experts=8, num_experts_per_tok=3,
        norm_topk_prob=True, max_position_embeddings=256, tie_word_embeddings=False,
        rope_parameters=base.rope(1e5), **NONE,
    ), ATTENTION),
    # Weights that are not normalized; of every other layer, the last has none after all.
    "qwen3-moe-sparse": (Qwen3MoeConfig(
        vocab_size=95, hidden_size=40, intermediate_size=44, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, num_experts=6, num_experts_per_tok=2,
        norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[3], max_position_embeddings=256, tie_word_embeddings=True,
        rope_parameters=base.rope(1e4), **NONE,
    ), ATTENTION),
    # A shared expert behind a sigmoid, biases on queries, keys and values.
    "qwen2-moe": (Qwen2MoeConfig(
        vocab_size=109, hidden_size=32, intermediate_size=44, moe_intermediate_size=20,
        shared_expert_intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=256, tie_word_embeddings=False,
        rope_parameters=base.rope(1e4), **NONE,
    ), ATTENTION),
    # Two of four experts, whose names are Mixtral's.
    "mixtral": (MixtralConfig(
        vocab_size=93, hidden_size=32, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        sliding_window=None, rope_parameters=base.rope(1e4), tie_word_embeddings=False, **NONE,
    ), ATTENTION),
}
FAMILIES |= {
    # Gated delta layers, and attention with an output gate.
    "qwen3_5": (qwen3_5_text(109, intermediate_size=44), DELTA),
    # The text part beside a vision tower, with a head of its own.
    "qwen3_5-multimodal": (Qwen3_5Config(
        text_config=qwen3_5_text(103, intermediate_size=44, num_hidden_layers=3, tie_word_embeddings=False).to_dict(), vision_config=dict(
            hidden_size=8, intermediate_size=8, depth=1, num_heads=1, out_hidden_size=36, num_position_embeddings=16,
        ), tie_word_embeddings=False, **NONE,
    ), DELTA),
    # A mixture with a shared expert in every layer.
    "qwen3_5-moe": (qwen3_5_text(
        97, Qwen3_5MoeTextConfig, num_hidden_layers=3, moe_intermediate_size=16, shared_expert_intermediate_size=28,
        num_experts=6, num_experts_per_tok=2, tie_word_embeddings=False,
    ), [*ATTENTION, *DELTA[7:]]),
    # Sinks, a window of 12 in the first of two layers, YaRN without rounded bounds, and experts with biases and a limit that
    # their activations reach.
    "gpt-oss": (GptOssConfig(
        vocab_size=101, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=6, num_experts_per_tok=2, sliding_window=12,
        swiglu_limit=1.5, max_position_embeddings=256, tie_word_embeddings=False, rope_parameters={
            "rope_type": "yarn", "rope_theta": 15e4, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        }, **NONE,
    ), ATTENTION),
    # The text part of a multimodal mixture.
    "qwen3_5-moe-multimodal": (Qwen3_5MoeConfig(
        text_config=qwen3_5_text(
            93, Qwen3_5MoeTextConfig, num_hidden_layers=3, moe_intermediate_size=16, shared_expert_intermediate_size=20,
            num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
        ).to_dict(), vision_config=dict(
            hidden_size=8, intermediate_size=8, depth=1, num_heads=1, out_hidden_size=36, num_position_embeddings=16,
        ), tie_word_embeddings=False, **NONE,
    ), [*ATTENTION, *DELTA[7:]]),
    # LayerNorm, both halves on one norm, a window and interleaved positions in all layers but the third.
    "cohere2": (Cohere2Config(
        vocab_size=83, hidden_size=48, intermediate_size=52, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=12, sliding_window_pattern=3, logit_scale=0.25,
        rope_parameters=base.rope(5e4), tie_word_embeddings=True, **NONE,
    ), SPLIT),
    # Granite's multipliers around three of six experts.
    "granite-moe": (GraniteMoeConfig(
        vocab_size=105, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
        embedding_multiplier=0.6, attention_multiplier=0.2, residual_multiplier=1.3, logits_scaling=0.7,
        num_local_experts=6, num_experts_per_tok=3, rope_parameters=base.rope(1e4), **NONE,
    ), ATTENTION),
    # Windows in two of three layers; in the third wider heads, whose keys are the values too.
    "gemma4": (Gemma4TextConfig(
        vocab_size=107, hidden_size=40, intermediate_size=52, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"], sliding_window=12,
        hidden_size_per_layer_input=0, final_logit_softcapping=4.0, max_position_embeddings=256, **NONE,
    ), SPLIT),
}
# Without rotation, a key bias shifts all scores of a query alike: its gradient is rounding error, which AdamW must not
# blow up.
ADAM_EPSILON = {"glm": 1e-4}
LORA_RUN = {**base.LORA_RUN, "weight_decay": 0.1}
FULL_RUN = {
    **base.LORA_RUN, "max_steps": 6, "gradient_accumulation_steps": 2, "weight_decay": 0.5,
    "lr_scheduler_type": "cosine", "warmup_steps": 2,
}


def train(directory, adapter, run, **options):
    """base.train, with the trained weights under the names of checkpoints."""
    steps, final = TRAIN(directory, adapter, run, **options)
    if adapter:
        return steps, final
    # Buffers are saved with a model, as they were.
    stored = load_file(directory / "model.safetensors")
    final |= {name: tensor for name, tensor in stored.items() if name.endswith("layer_scalar")}
    return steps, moe.disk_names(final, moe.read_config(directory))


class MultimodalOrText:
    """transformers' own choice, but for Qwen3.5 with a vision tower, of which it would take the text part alone."""

    @staticmethod
    def of(config):
        return AutoModelForImageTextToText if config.model_type in ("qwen3_5", "qwen3_5_moe") else AutoModelForCausalLM

    @classmethod
    def from_config(cls, config):
        return cls.of(config).from_config(config)

    @classmethod
    def from_pretrained(cls, directory, **options):
        return cls.of(AutoConfig.from_pretrained(directory)).from_pretrained(directory, **options)


def stored_name(directory, key):
    """base.stored_name; Qwen3.5's files have the names of its modules."""
    return key if moe.read_config(directory)["model_type"].startswith("qwen3_5") else STORED_NAME(directory, key)


def load(directory, *arguments, **options):
    """base.load, with a loop over experts, which float64 needs."""
    model = LOAD(directory, *arguments, **options)
    if moe.is_mixture(model.config.get_text_config()):
        model.set_experts_implementation("eager")
    return model


TRAIN, base.train = base.train, train
LOAD, base.load = base.load, load
STORED_NAME, base.stored_name = base.stored_name, stored_name
base.AutoModelForCausalLM = MultimodalOrText


def main():
    base.deterministic()
    for index, (name, (config, targets)) in enumerate(FAMILIES.items()):
        if not sys.argv[1:] or name in sys.argv[1:]:
            make_family(HERE / name, name, config, targets, SEED + 1000 * index)
    base.write_json(HERE / "versions.json", {"seed": SEED, **base.versions()})


def make_family(directory, name, config, targets, seed):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    base.CONFIGS[name] = config
    base.save_checkpoint(directory, name, generator)
    rows = base.make_rows(config.get_text_config().vocab_size, generator)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = base.load(directory)
    expect = {"rows": base.evaluate(model, rows), "spread": base.evaluation_spread(directory, rows)}
    expect["generate"] = base.make_generations(directory, model, generator, stop_early=False)
    excluded = r".*\.(vision_tower|visual)\..*" if hasattr(config, "vision_config") else None
    lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=targets, exclude_modules=excluded)
    expect["adapters"] = {
        "all-linear": {"rows": base.make_adapter(directory, name, "all-linear", lora, rows, generator)}
    }
    if moe.is_mixture(config):
        for adapter, experts in moe.expert_adapters(config).items():
            made = base.make_adapter(directory, name, adapter, experts, rows, generator)
            expect["adapters"][adapter] = {"rows": made}
        base.make_trajectory(directory, "experts", "experts", clipped(directory, "experts", LORA_RUN))
    base.write_json(directory / "expect.json", expect)
    named = moe.by_output(moe.router_names(gradients(directory, rows), moe.read_config(directory)), config)
    save_file(named, directory / "gradients.safetensors")
    base.make_trajectory(directory, "lora", "all-linear", clipped(directory, "all-linear", LORA_RUN))
    full = {**FULL_RUN, "adam_epsilon": ADAM_EPSILON.get(name, FULL_RUN["adam_epsilon"])}
    base.make_trajectory(directory, "full", None, clipped(directory, None, full))
    if config.model_type == "gpt_oss":
        gpt_oss.make_mxfp4(directory, rows, base, lambda where: clipped(where, "experts", LORA_RUN))
    print(f"{name}: spread {expect['spread']:.1e}, mean nll {base.mean_nll(expect['rows']):.2f}")


def gradients(directory, rows):
    """The gradient of the sum of all rows' counted losses, for every weight."""
    model = base.load(directory)
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=base.IGNORED, reduction="sum").backward()
    return {name: weight.grad.contiguous() for name, weight in model.named_parameters() if weight.grad is not None}


def clipped(directory, adapter, run):
    """`run` with a max_grad_norm between the norms of its steps, so that some steps are clipped and others are not."""
    limit = 1e9
    for _ in range(20):
        steps, _ = base.train(directory, adapter, {**run, "max_grad_norm": limit})
        norms = sorted(step["grad_norm"] for step in steps)
        if norms[0] < limit < norms[-1] and all(abs(norm / limit - 1) > 2e-2 for norm in norms):
            return {**run, "max_grad_norm": limit}
        gaps = [(high / low, low, high) for low, high in zip(norms[1:-1], norms[2:])]
        _, low, high = max(gaps)
        limit = round((low * high) ** 0.5, 3)
    raise SystemExit(f"{directory.name}: no max_grad_norm parts the steps of the run")


if __name__ == "__main__":
    main()
