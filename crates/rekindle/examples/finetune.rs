use rekindle::{ChatPrompt, DataSource, FastLanguageModel, GenerationConfig, LoraConfig, SftConfig, SftTrainer};

fn main() -> Result<(), rekindle::Error> {
    let (model, tokenizer) =
        FastLanguageModel::from_pretrained("examples/quickstart/base").max_seq_length(128).load()?;
    let mut model = model.get_peft_model(LoraConfig::new(8).lora_alpha(16.0))?;

    let data = DataSource::new("examples/quickstart/train.jsonl");
    let config = SftConfig { max_steps: Some(40), learning_rate: Some(8e-3), ..SftConfig::default() };
    let report = SftTrainer::new(&mut model, &tokenizer, data, config).train()?;
    println!("loss {:.2} -> {:.2}", report.steps[0].loss, report.steps[39].loss);
    model.save_pretrained("target/finetuned")?;

    let prompt = ChatPrompt::new(None, "What is a whale?").encode(&tokenizer)?;
    let greedy = GenerationConfig { eos_ids: model.end_tokens(Some(&tokenizer))?, ..GenerationConfig::default() };
    println!("{}", model.generate_text(&tokenizer, &prompt, &greedy, &[], |_| true)?.text);
    Ok(())
}
