//! The families with their architectures.

use super::{AttentionScale, Factors, GgufArchitecture, Mixtures, Rotation, Windows};

const LLAMA: GgufArchitecture = GgufArchitecture {
    model_type: "llama",
    name: "llama",
    rotates_pairs: true,
    windows: Windows::Ignored,
    attention_scale: AttentionScale::Stored,
    has_divisors: true,
    rotation: Rotation::All,
    factors: Factors::None,
    mixtures: Mixtures::None,
    has_shared_expert: false,
    has_linear_layers: false,
    names_post_attention_norm: false,
    scales_windowed: false,
    is_parallel: false,
};

/// An architecture that rotates halves of heads, as most do.
const HALVES: GgufArchitecture =
    GgufArchitecture { rotates_pairs: false, attention_scale: AttentionScale::HeadDim, has_divisors: false, ..LLAMA };

/// The families, each with its architecture.
pub(super) const ARCHITECTURES: [GgufArchitecture; 28] = [
    LLAMA,
    GgufArchitecture { model_type: "mistral", ..LLAMA },
    GgufArchitecture { model_type: "ministral3", name: "mistral3", ..LLAMA },
    GgufArchitecture {
        model_type: "smollm3",
        name: "smollm3",
        has_divisors: false,
        rotation: Rotation::AllButEvery(4),
        ..LLAMA
    },
    GgufArchitecture { model_type: "granite", name: "granite", factors: Factors::All, ..LLAMA },
    GgufArchitecture {
        model_type: "granitemoe",
        name: "granitemoe",
        factors: Factors::All,
        mixtures: Mixtures::Mixtral,
        ..LLAMA
    },
    GgufArchitecture { model_type: "qwen2", name: "qwen2", ..HALVES },
    GgufArchitecture { model_type: "qwen3", name: "qwen3", ..HALVES },
    GgufArchitecture {
        model_type: "gemma2",
        name: "gemma2",
        windows: Windows::Listed,
        attention_scale: AttentionScale::Gemma(46),
        ..HALVES
    },
    GEMMA3,
    GgufArchitecture { model_type: "gemma3", ..GEMMA3 },
    GgufArchitecture { model_type: "phi3", name: "phi3", ..HALVES },
    GgufArchitecture { model_type: "olmo2", name: "olmo2", windows: Windows::Listed, ..HALVES },
    GgufArchitecture { model_type: "olmo3", name: "olmo2", windows: Windows::Listed, ..HALVES },
    GgufArchitecture {
        model_type: "exaone4",
        name: "exaone4",
        windows: Windows::ListedIn64Layers,
        has_divisors: true,
        rotation: Rotation::WindowedIfAny,
        ..HALVES
    },
    GgufArchitecture {
        model_type: "cohere2",
        name: "cohere2",
        rotates_pairs: true,
        windows: Windows::Listed,
        rotation: Rotation::Windowed,
        factors: Factors::Logits,
        scales_windowed: true,
        is_parallel: true,
        ..HALVES
    },
    GgufArchitecture { model_type: "glm4", name: "glm4", rotates_pairs: true, ..HALVES },
    GgufArchitecture { model_type: "glm", name: "chatglm", rotates_pairs: true, ..HALVES },
    GgufArchitecture { model_type: "hunyuan_v1_dense", name: "hunyuan-dense", ..HALVES },
    GgufArchitecture { model_type: "mistral3", name: "mistral3", ..LLAMA },
    GgufArchitecture { model_type: "mixtral", mixtures: Mixtures::Mixtral, ..LLAMA },
    GgufArchitecture {
        model_type: "qwen2_moe",
        name: "qwen2moe",
        mixtures: Mixtures::Qwen(false),
        has_shared_expert: true,
        ..HALVES
    },
    GgufArchitecture { model_type: "qwen3_moe", name: "qwen3moe", mixtures: Mixtures::Qwen(true), ..HALVES },
    QWEN35,
    GgufArchitecture { model_type: "qwen3_5_text", ..QWEN35 },
    QWEN35_MOE,
    GgufArchitecture { model_type: "qwen3_5_moe_text", ..QWEN35_MOE },
    GgufArchitecture {
        model_type: "gpt_oss",
        name: "gpt-oss",
        windows: Windows::Listed,
        mixtures: Mixtures::GptOss,
        names_post_attention_norm: true,
        scales_windowed: true,
        ..HALVES
    },
];

const QWEN35: GgufArchitecture = GgufArchitecture {
    model_type: "qwen3_5",
    name: "qwen35",
    has_linear_layers: true,
    names_post_attention_norm: true,
    ..HALVES
};

const QWEN35_MOE: GgufArchitecture = GgufArchitecture {
    model_type: "qwen3_5_moe",
    name: "qwen35moe",
    mixtures: Mixtures::Qwen(true),
    has_shared_expert: true,
    ..QWEN35
};

const GEMMA3: GgufArchitecture = GgufArchitecture {
    model_type: "gemma3_text",
    name: "gemma3",
    windows: Windows::Listed,
    attention_scale: AttentionScale::Gemma(62),
    ..HALVES
};
