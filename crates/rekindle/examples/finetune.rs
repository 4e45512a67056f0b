use rekindle::{
    DataSource, FastLanguageModel, GenerationConfig, LoraConfig, Message, RenderOptions, SftConfig, SftTrainer,
};

fn main() -> Result<(), rekindle::Error> {
    let (model, tokenizer) =
        FastLanguageModel::from_pretrained("examples/quickstart/base").max_seq_length(128).load()?;
    let mut model = model.get_peft_model(LoraConfig::new(8).lora_alpha(16.0))?;

    let data = DataSource::new("examples/quickstart/train.jsonl");
    let config = SftConfig { max_steps: Some(40), learning_rate: Some(8e-3), ..SftConfig::default() };
    let report = SftTrainer::new(&mut model, &tokenizer, data, config).train()?;
    println!("loss {:.2} -> {:.2}", report.steps[0].loss, report.steps[39].loss);
    model.save_pretrained("target/finetuned")?;

    let question = Message::new("user", "What is a whale?");
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    let prompt = tokenizer.encode(&tokenizer.chat_template()?.render(&[question], &options)?, false)?;
    let greedy = GenerationConfig { eos_ids: tokenizer.eos_ids().to_vec(), ..GenerationConfig::default() };
    println!("{}", tokenizer.decode(&model.generate(&prompt, &greedy, |_| true)?.ids, true)?);
    Ok(())
}
