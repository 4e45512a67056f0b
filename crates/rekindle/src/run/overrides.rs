//! Overrides of a run file's keys, `section.key=value`.

use std::str::FromStr;

use toml::{Table, Value};

use super::{ALIAS_SECTIONS, GRADIENT_CHECKPOINTING};
use crate::Error;

/// A value for a key of a run file that replaces the file's own: `section.key=value`.
///
/// The value is TOML, or else plain text: `train.max_steps=60`, `data.train=rows.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigOverride {
    path: Vec<String>,
    value: Value,
}

impl ConfigOverride {
    /// Sets the key in `table`; adds its section if it is missing.
    pub(super) fn apply(&self, table: &mut Table) -> Result<(), String> {
        let (key, sections) = self.path.split_last().expect("parsed from at least one segment");
        let mut place = table;
        for section in sections {
            let entry = place.entry(section).or_insert_with(|| Table::new().into());
            let kind = entry.type_str();
            place = entry.as_table_mut().ok_or_else(|| {
                format!("{}: \"{section}\" is a key of the run file ({kind}), not a section", self.path.join("."))
            })?;
        }
        place.insert(key.clone(), self.value.clone());
        Ok(())
    }
}

impl FromStr for ConfigOverride {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text).map_err(Error::Argument)
    }
}

impl ConfigOverride {
    fn parse(text: &str) -> Result<Self, String> {
        let (path, value) = text
            .split_once('=')
            .ok_or_else(|| format!("\"{text}\" is not of the form section.key=value, such as train.max_steps=60"))?;
        let path: Vec<String> = path.split('.').map(|part| part.trim().to_owned()).collect();
        if path.iter().any(String::is_empty) {
            return Err(format!("\"{text}\" has no name before \"=\"; write section.key=value"));
        }
        let value = parse_value(value);
        if let [section, key] = &path[..]
            && key == GRADIENT_CHECKPOINTING
            && ALIAS_SECTIONS.contains(&section.as_str())
        {
            return Ok(Self { path: ["train", GRADIENT_CHECKPOINTING].map(str::to_owned).into(), value });
        }
        if path == ["model"] && value.is_str() {
            // Short for the name alone, as in a run file; the rest of the section stays.
            return Ok(Self { path: ["model", "name_or_path"].map(str::to_owned).into(), value });
        }
        Ok(Self { path, value })
    }
}

/// Parses `text` as a TOML value; text that is none is a string.
pub fn parse_value(text: &str) -> Value {
    let plain = || Value::String(text.to_owned());
    match format!("value = {text}").parse::<Table>() {
        // A line break in the text could have begun another key.
        Ok(mut table) if table.len() == 1 => table.remove("value").unwrap_or_else(plain),
        _ => plain(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        text.parse::<ConfigOverride>().unwrap().value
    }

    #[test]
    fn values_are_toml_or_text() {
        assert_eq!(value("train.max_steps=60"), Value::Integer(60));
        assert_eq!(value("train.learning_rate=2e-4"), Value::Float(2e-4));
        assert_eq!(value("data.shuffle=false"), Value::Boolean(false));
        assert_eq!(value("lora.target_modules=[\"q_proj\", \"v_proj\"]").as_array().map(Vec::len), Some(2));
        for text in ["data/a b.jsonl", "a=b", "", "1\nseed = 2", "wgpu:0"] {
            assert_eq!(value(&format!("data.train={text}")), Value::String(text.to_owned()));
        }
        assert_eq!(value("data.train=\"12\""), Value::String("12".to_owned()));
    }

    #[test]
    fn keys_are_set_in_new_and_old_sections() {
        let mut table: Table = "seed = 1\n[train]\nmax_steps = 5\nwarmup_steps = 2".parse().unwrap();
        for text in ["seed=2", "train.max_steps=6", "lora.r=4"] {
            text.parse::<ConfigOverride>().unwrap().apply(&mut table).unwrap();
        }
        let expected = "seed = 2\n[train]\nmax_steps = 6\nwarmup_steps = 2\n[lora]\nr = 4";
        assert_eq!(table, expected.parse().unwrap());
        let error = "seed.x=1".parse::<ConfigOverride>().unwrap().apply(&mut table).unwrap_err();
        assert!(error.contains("\"seed\" is a key of the run file"), "{error}");
    }

    #[test]
    fn other_forms_are_refused() {
        assert!("train.max_steps".parse::<ConfigOverride>().unwrap_err().to_string().contains("section.key=value"));
        assert!(".r=3".parse::<ConfigOverride>().is_err());
        assert!("=3".parse::<ConfigOverride>().is_err());
    }
}
