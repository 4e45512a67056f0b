//! `[[rewards]]`: the rewards of completions.

use toml::Table;

use crate::rewards::RewardConfig;

/// Reads the tables of `[[rewards]]`, with a problem for each that cannot be read.
pub(super) fn read(problems: &mut Vec<String>, tables: Vec<Table>) -> Vec<RewardConfig> {
    let mut rewards = Vec::with_capacity(tables.len());
    for (index, table) in tables.into_iter().enumerate() {
        match table.try_into::<RewardConfig>() {
            Ok(reward) => rewards.push(reward),
            Err(error) => problems.push(format!("[[rewards]] {}: {}", index + 1, error.message())),
        }
    }
    rewards
}

#[cfg(test)]
mod tests {
    use crate::run::RunConfig;

    fn parse(rewards: &str) -> Result<RunConfig, String> {
        let text = format!("model = \"m\"\n[lora]\nr = 4\n[data]\ntrain = \"t\"\n{rewards}");
        RunConfig::from_toml(&text, &[]).map_err(|error| error.to_string())
    }

    #[test]
    fn rewards_are_read_and_written() {
        let text = "[[rewards]]\ntype = \"format\"\nweight = 0.5\n[[rewards]]\ntype = \"json\"\ngate = \"format\"\n\
                    schema = { type = \"object\", required = [\"n\"] }\n[[rewards]]\ntype = \"command\"\n\
                    name = \"judge\"\ncommand = [\"python3\", \"judge.py\"]\ntimeout = 5\n";
        let config = parse(text).unwrap();
        let names: Vec<&str> = config.rewards.iter().map(|reward| reward.name()).collect();
        assert_eq!(names, ["format", "json", "judge"]);
        let again = RunConfig::from_toml(&config.to_toml(), &[]).unwrap();
        assert_eq!(again.rewards, config.rewards, "{}", config.to_toml());
        assert!(!parse("").unwrap().to_toml().contains("rewards"));
    }

    #[test]
    fn mistakes_are_answered() {
        for (text, expected) in [
            ("[[rewards]]\ntype = \"exact\"\ncolum = \"a\"", "[[rewards]] 1: reward of type \"exact\": unknown field"),
            ("[[rewards]]\ncolumn = \"a\"", "[[rewards]] 1: a reward has no type"),
            ("[[rewards]]\ntype = \"regex\"\npattern = \"(\"", "[[rewards]] reward \"regex\": pattern \"(\" cannot be"),
            ("[[rewards]]\ntype = \"format\"\ngate = \"x\"", "the gate \"x\" is no reward before this one"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
