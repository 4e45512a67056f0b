use super::*;

const HEAD: usize = 16;

/// Returns a `config.json` with a window of 1,024 and these parameters.
fn model(parameters: Value) -> Value {
    json!({ "max_position_embeddings": 1024, "rope_parameters": parameters })
}

fn plain() -> Value {
    model(json!({ "rope_type": "default", "rope_theta": 10000.0 }))
}

fn yarn() -> Value {
    model(json!({
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256
    }))
}

fn llama3() -> Value {
    model(json!({
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    }))
}

fn longrope(more: Value) -> Value {
    let mut parameters = json!({
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
        "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": [1, 1, 1.5, 2, 2, 3, 4, 5]
    });
    parameters.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("an object"));
    model(parameters)
}

fn table(value: Value) -> RopeScaling {
    RopeScaling::Table(value.as_object().cloned().expect("an object"))
}

fn native(config: &Value) -> RopeConfig {
    RopeConfig::from_config(config, HEAD).expect("valid")
}

fn extended(config: &Value, length: usize, choice: &RopeScaling) -> (ContextExtension, RopeConfig) {
    let window = config["max_position_embeddings"].as_u64().expect("a number") as usize;
    let extension =
        extend_context(config, HEAD, window, length, choice).expect("valid request").expect("the window is extended");
    let rope = extension.positions.rope(HEAD).expect("valid");
    (extension, rope)
}

fn refused(config: &Value, length: usize, choice: &RopeScaling) -> String {
    extend_context(config, HEAD, 1024, length, choice).expect_err("the request is refused").to_string()
}

#[test]
fn auto_changes_nothing_within_the_window_and_a_named_method_is_refused() {
    for config in [plain(), yarn(), llama3(), longrope(json!({}))] {
        assert_eq!(extend_context(&config, HEAD, 1024, 1024, &RopeScaling::Auto), Ok(None));
    }
    let text = refused(&plain(), 512, &RopeScaling::Yarn);
    assert!(text.contains("\"yarn\" has nothing to scale: max_seq_length 512 is within the window of 1024"), "{text}");
}

#[test]
fn the_factor_is_computed_from_the_length() {
    let f = |config: &Value, seq_len| native(config).inv_freq(seq_len);
    let (extension, rope) = extended(&plain(), 2560, &RopeScaling::Linear);
    assert_eq!(*rope.scaling(), Scaling::Linear { factor: 2.5 });
    assert_eq!(extension.to_string(), "linear, factor 2.5: window 1024 -> 2560");
    let (_, rope) = extended(&plain(), 2560, &RopeScaling::Yarn);
    assert!(matches!(rope.scaling(), Scaling::Yarn { factor: 2.5, original: 1024, .. }), "{rope:?}");
    // A named method has no limit.
    let (_, rope) = extended(&plain(), 10240, &RopeScaling::Linear);
    assert_eq!(*rope.scaling(), Scaling::Linear { factor: 10.0 });

    let (extension, rope) = extended(&plain(), 2048, &RopeScaling::Dynamic);
    assert_eq!(extension.to_string(), "dynamic, factor 2: window 1024 -> 2048");
    let by_length = model(json!({ "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0 }));
    assert_eq!(*rope.scaling(), Scaling::Default);
    // theta · (2·2 − 1)^(16/14)
    assert!((rope.theta() / (10000.0 * 3f64.powf(16.0 / 14.0)) - 1.0).abs() < 1e-12, "{}", rope.theta());
    assert_eq!(rope.inv_freq(1), f(&by_length, 2048), "the run's length decides");
    assert_ne!(rope.inv_freq(1), f(&by_length, 1), "transformers chooses per batch");
}

#[test]
fn auto_uses_the_best_method_up_to_four_times_the_window() {
    let best = extended(&plain(), 4096, &RopeScaling::BEST);
    assert_eq!(extended(&plain(), 4096, &RopeScaling::Auto), best);
    let text = refused(&plain(), 4097, &RopeScaling::Auto);
    for part in ["max_seq_length is 4097, 4.0 times the window of 1024", "or set rope_scaling to a method"] {
        assert!(text.contains(part), "{text}");
    }
    let text = refused(&llama3(), 5000, &RopeScaling::Auto);
    assert!(text.contains("rope_scaling = { rope_type = \"llama3\", ... }"), "{text}");
}

/// Slow pairs reach the same angles at the new window as before at the old one; fast pairs are unchanged.
#[test]
fn extending_llama3_and_yarn_changes_only_their_slow_pairs() {
    for config in [llama3(), yarn()] {
        let (extension, rope) = extended(&config, 3072, &RopeScaling::Auto);
        assert_eq!((extension.from, extension.positions.max_position_embeddings()), (1024, 3072));
        let (before, after) = (native(&config).inv_freq(1), rope.inv_freq(1));
        assert_eq!(before[0], after[0], "the fastest pair is kept");
        let slowest = before.len() - 1;
        let (was, is) = (f64::from(before[slowest]) * 1024.0, f64::from(after[slowest]) * 3072.0);
        assert!((was / is - 1.0).abs() < 1e-6, "{was} {is}");
        assert!(before.iter().zip(&after).all(|(before, after)| after <= before));
    }
    let (_, rope) = extended(&yarn(), 2048, &RopeScaling::Yarn);
    assert!(matches!(rope.scaling(), Scaling::Yarn { factor: 8.0, original: 256, .. }), "{rope:?}");
    assert!(
        (rope.attention_factor() - (0.1 * 8f64.ln() + 1.0)).abs() < 1e-12,
        "the attention factor grows with the factor"
    );
    let given = |config: &mut Value| config["rope_parameters"]["attention_factor"] = json!(1.25);
    let mut config = yarn();
    given(&mut config);
    assert_eq!(
        extended(&config, 2048, &RopeScaling::Auto).1.attention_factor(),
        1.25,
        "a given attention factor is kept"
    );
}

#[test]
fn longrope_keeps_the_proportions_of_its_factors() {
    let (_, rope) = extended(&longrope(json!({})), 2048, &RopeScaling::Auto);
    let Scaling::LongRope { short_factor, long_factor, original, attention_factor } = rope.scaling() else {
        panic!("{rope:?}")
    };
    assert_eq!((short_factor, *original), (long_factor, 256), "the same factors for every length");
    assert!((attention_factor - (1.0 + 8f64.ln() / 256f64.ln()).sqrt()).abs() < 1e-12, "factor 4 times 2");
    // The factor is 1024 / 256 = 4: 1 stays unscaled, 4 is scaled in full, 2 = √4 by √2, and 5 no more than in full.
    let expected = [1.0, 1.0, 1.5 * 2f64.powf(1.5f64.ln() / 4f64.ln()), 2.0 * 2f64.sqrt(), 2.0 * 2f64.sqrt()];
    for (got, expected) in long_factor.iter().zip(expected) {
        assert!((got / expected - 1.0).abs() < 1e-12, "{long_factor:?}");
    }
    assert_eq!(long_factor[6..], [8.0, 10.0]);
    // Phi-3 stores P next to the parameters, where it takes precedence.
    let mut outer = longrope(json!({}));
    let parameters = outer["rope_parameters"].as_object_mut().expect("an object");
    let original = parameters.remove(ORIGINAL).expect("P is present");
    outer[ORIGINAL] = original;
    let (extension, again) = extended(&outer, 2048, &RopeScaling::Auto);
    assert_eq!(again, rope);
    extension.positions.apply(&mut outer);
    assert_eq!(native(&outer), rope);
}

#[test]
fn a_native_dynamic_scaling_uses_the_length_of_the_run() {
    let config = model(json!({ "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0 }));
    for choice in [RopeScaling::Auto, RopeScaling::Dynamic] {
        let (_, rope) = extended(&config, 2048, &choice);
        assert_eq!(rope.inv_freq(1), native(&config).inv_freq(2048));
    }
}

#[test]
fn a_named_method_never_replaces_a_native_scaling() {
    let text = refused(&llama3(), 2048, &RopeScaling::Linear);
    for part in [
        "\"linear\" would replace the llama3 scaling",
        "use \"auto\" to keep",
        "{ rope_type = \"linear\", factor = ... }",
    ] {
        assert!(text.contains(part), "{text}");
    }
    refused(&yarn(), 2048, &RopeScaling::Dynamic);
    let linear = model(json!({ "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0 }));
    for choice in [RopeScaling::Auto, RopeScaling::Linear] {
        let text = refused(&linear, 2048, &choice);
        assert!(
            text.contains("factor = 8 }") && text.contains("or factor = 4 if the model was trained for 2048"),
            "{text}"
        );
    }
    let (_, rope) = extended(&llama3(), 2048, &table(json!({ "type": "linear", "factor": 2.0 })));
    assert_eq!((rope.scaling(), rope.theta()), (&Scaling::Linear { factor: 2.0 }, 500_000.0));
}

#[test]
fn a_yarn_reaching_beyond_max_position_embeddings_keeps_its_longer_window() {
    let config = json!({ "max_position_embeddings": 320, "rope_theta": 10000.0, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256 } });
    assert_eq!(extend_context(&config, HEAD, 320, 1024, &RopeScaling::Auto), Ok(None));
    let (extension, rope) = extended(&config, 2048, &RopeScaling::Auto);
    assert_eq!(extension.from, 1024);
    assert!(matches!(rope.scaling(), Scaling::Yarn { factor: 8.0, .. }), "{rope:?}");
}

#[test]
fn a_table_overrides_the_limits_and_gets_missing_parameters() {
    let beyond_auto = table(json!({ "rope_type": "yarn", "beta_fast": 16 }));
    let (_, rope) = extended(&plain(), 8192, &beyond_auto);
    assert!(matches!(rope.scaling(), Scaling::Yarn { factor: 8.0, original: 1024, beta_fast: 16.0, .. }), "{rope:?}");
    let (extension, _) = extended(&plain(), 512, &table(json!({ "rope_type": "yarn", "factor": 4.0 })));
    assert_eq!(extension.positions.max_position_embeddings(), 1024, "a table applies within the window and keeps it");
    let (_, rope) = extended(&plain(), 2048, &table(json!({ "rope_type": "default", "rope_theta": 50000.0 })));
    assert_eq!(rope.theta(), 50000.0);
    for (parameters, part) in [
        (json!({}), "rope_scaling.rope_type is missing"),
        (json!({ "rope_type": "lineer", "factor": 2 }), "rope_type \"lineer\" is not supported; supported: default, "),
        (json!({ "rope_type": "linear", "factor": "2" }), "rope_scaling.factor is \"2\"; expected a number above 0"),
        (json!({ "rope_type": "linear", "fcator": 2 }), "rope_scaling.fcator has no effect with rope_type \"linear\""),
        (json!({ "rope_type": "llama3", "factor": 8.0 }), "rope_scaling.low_freq_factor is missing"),
    ] {
        let text = refused(&plain(), 2048, &table(parameters));
        assert!(text.contains(part), "{text}");
    }
    let text = refused(&plain(), 512, &table(json!({ "rope_type": "dynamic", "factor": 2.0 })));
    assert!(text.contains("nothing to scale"), "{text}");
}

#[test]
fn an_extension_can_be_requested_again_and_reloaded() {
    let configs = [plain(), yarn(), llama3(), longrope(json!({ "attention_factor": 1.5 }))];
    let choices = [RopeScaling::Auto, RopeScaling::Linear, RopeScaling::Dynamic, RopeScaling::Yarn];
    let mut seen = 0;
    for config in &configs {
        for choice in &choices {
            let Ok(Some(first)) = extend_context(config, HEAD, 1024, 2048, choice) else { continue };
            let (again, _) = extended(config, 2048, &RopeScaling::Table(first.request.clone()));
            assert_eq!(again, first);
            let saved = Positions::from_json(&first.positions.to_json()).expect("just made");
            let (opened, _) = extended(config, 100, &RopeScaling::Saved(saved.clone()));
            assert_eq!(opened.positions, first.positions, "for any shorter length");
            let text = refused(config, 2049, &RopeScaling::Saved(saved));
            assert!(text.contains("trained with a window of 2048"), "{text}");
            seen += 1;
        }
    }
    assert_eq!(seen, 8, "four for the unscaled model, auto for the other three, yarn for the yarn model");
}

#[test]
fn configs_in_the_older_layout_get_both_layouts() {
    let mut config = json!({
        "max_position_embeddings": 1024, "rope_theta": 10000.0, "rope_scaling": null, "partial_rotary_factor": 0.5,
        "other": 1
    });
    for choice in [RopeScaling::Linear, RopeScaling::Dynamic, RopeScaling::Yarn] {
        let (extension, rope) = extended(&config.clone(), 2048, &choice);
        let mut written = config.clone();
        extension.positions.apply(&mut written);
        assert_eq!((&written["max_position_embeddings"], &written["other"]), (&json!(2048), &json!(1)));
        assert_eq!(native(&written), rope, "readers of both layouts agree: {written}");
        let older = json!({
            "max_position_embeddings": 2048, "rope_theta": written["rope_theta"],
            "rope_scaling": written["rope_scaling"], "partial_rotary_factor": 0.5
        });
        assert_eq!(native(&older), rope, "a reader of the older layout only: {written}");
        assert_eq!(written["rope_parameters"]["partial_rotary_factor"], 0.5);
    }
    config.as_object_mut().expect("an object").retain(|key, _| !key.starts_with("rope"));
    let (extension, _) = extended(&config.clone(), 2048, &RopeScaling::Yarn);
    extension.positions.apply(&mut config);
    assert!(config.get("rope_theta").is_none() && config.get("rope_scaling").is_none(), "{config}");
}
