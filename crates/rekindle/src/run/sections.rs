//! Parsing of a run file's sections into structs. Reports every unknown key and every wrong type, not only the first.

use serde::de::value::Error as ValueError;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;
use toml::{Table, Value};

use super::foreign;
use super::nearest::{hint, nearest};

/// A reader of sections that collects their problems, one sentence each.
#[derive(Debug)]
pub(super) struct SectionReader {
    /// The keys of each section; the top level of the file is the section `""`.
    known: Vec<(&'static str, Vec<&'static str>)>,
    pub(super) problems: Vec<String>,
}

impl SectionReader {
    pub(super) fn new(known: Vec<(&'static str, Vec<&'static str>)>) -> Self {
        Self { known, problems: Vec::new() }
    }

    /// Reads `section`; unknown keys and values of the wrong type keep their defaults.
    ///
    /// `T` has a default for every field, so each key can be read alone.
    pub(super) fn read<T: DeserializeOwned + Default>(&mut self, section: &str, table: Table) -> T {
        let mut good = Table::new();
        for (key, value) in table {
            if !self.keys(section).contains(&key.as_str()) {
                if foreign::is_neutral(&key, &value) {
                    continue;
                }
                let problem = self.unknown(section, &key);
                self.problems.push(problem);
                continue;
            }
            match Table::from_iter([(key.clone(), value.clone())]).try_into::<T>() {
                Ok(_) => _ = good.insert(key, value),
                Err(error) => {
                    let problem = wrong_value(&place(section, &key), &value, error.message());
                    self.problems.push(problem);
                }
            }
        }
        good.try_into().unwrap_or_else(|error| {
            self.problems.push(error.message().to_owned());
            T::default()
        })
    }

    fn keys(&self, section: &str) -> &[&'static str] {
        self.known.iter().find(|(name, _)| *name == section).map_or(&[], |(_, keys)| keys)
    }

    fn unknown(&self, section: &str, key: &str) -> String {
        let place = place(section, key);
        // From the last section to the top, where "train" is a section and not the key of [data].
        if let Some((home, _)) = self.known.iter().rev().find(|(_, keys)| keys.contains(&key)) {
            return match *home {
                "" => format!("{place} is unknown; write {key} at the top of the file, before the first section"),
                home => format!("{place} is unknown; {key} belongs in [{home}]"),
            };
        }
        if let Some(advice) = foreign::advice(key) {
            return format!("{place} is unknown; {advice}");
        }
        if let Some((home, name)) = foreign::synonym(section, key) {
            let home = if home == section { String::new() } else { format!(" {}", describe(home)) };
            return format!("{place} is unknown; the key is \"{name}\"{home}");
        }
        let here = self.keys(section);
        // A name that is far from everything here may be a slip in a key of another section.
        let everywhere = || self.known.iter().flat_map(|(home, keys)| keys.iter().map(move |name| (*home, *name)));
        match nearest(key, here.iter().copied()) {
            Some(name) => format!("{place} is unknown; nearest: \"{name}\""),
            None => match nearest(key, everywhere().map(|(_, name)| name)) {
                Some(name) => {
                    let home = everywhere().find(|(_, other)| *other == name).map_or("", |(home, _)| home);
                    format!("{place} is unknown; nearest: \"{name}\" {}", describe(home))
                }
                None => format!("{place} is unknown; known: {}", here.join(", ")),
            },
        }
    }
}

/// Returns the key with its section, for messages.
fn place(section: &str, key: &str) -> String {
    if section.is_empty() { format!("key \"{key}\"") } else { format!("[{section}] key \"{key}\"") }
}

fn describe(section: &str) -> String {
    if section.is_empty() { "at the top of the file".to_owned() } else { format!("in [{section}]") }
}

/// Returns the problem with a value in plain words, from serde's message.
fn wrong_value(place: &str, value: &Value, message: &str) -> String {
    let Some((problem, expected)) = message.trim().split_once(", expected ") else {
        return format!("{place} = {value}: {message}");
    };
    if problem.starts_with("unknown field") {
        let fields: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        let field = problem.split('`').nth(1).unwrap_or_default();
        return format!("{place}: \"{field}\" is unknown; known: {}{}", fields.join(", "), hint_near(field, &fields));
    }
    if problem.starts_with("unknown variant") {
        let choice: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        let word = value.as_str().unwrap_or_default();
        return format!("{place} = {value}: expected one of {}{}", choice.join(", "), hint_near(word, &choice));
    }
    let expected = match expected {
        "usize" | "u64" | "u32" | "i64" => "a whole number, 0 or above",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "text in quotes",
        "a map" => "a section",
        other => other,
    };
    format!("{place} = {value}: expected {expected}")
}

fn hint_near(word: &str, choice: &[&str]) -> String {
    nearest(word, choice.iter().copied()).map(|_| hint(word, choice)).unwrap_or_default()
}

/// Returns the names of the fields that serde's derive reads into `T`.
pub(super) fn fields_of<T: DeserializeOwned>() -> Vec<&'static str> {
    let mut fields = Vec::new();
    // The probe always fails: it only collects the names.
    let _ = T::deserialize(FieldProbe(&mut fields));
    fields
}

struct FieldProbe<'a>(&'a mut Vec<&'static str>);

impl<'de> Deserializer<'de> for FieldProbe<'_> {
    type Error = ValueError;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, ValueError> {
        self.0.extend_from_slice(fields);
        Err(ValueError::custom("only the names were asked for"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, ValueError> {
        Err(ValueError::custom("not a struct"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use crate::{LoraConfig, SftConfig};

    use super::*;

    fn problems(section: &str, text: &str) -> Vec<String> {
        let known = vec![("", vec!["seed"]), ("lora", fields_of::<LoraConfig>()), ("train", fields_of::<SftConfig>())];
        let mut reader = SectionReader::new(known);
        let table = text.parse().unwrap();
        match section {
            "lora" => _ = reader.read::<LoraConfig>("lora", table),
            _ => _ = reader.read::<SftConfig>("train", table),
        }
        reader.problems
    }

    #[test]
    fn fields_come_from_serde() {
        let fields = fields_of::<SftConfig>();
        assert!(fields.contains(&"per_device_train_batch_size") && fields.contains(&"max_steps"), "{fields:?}");
        assert!(fields_of::<String>().is_empty());
    }

    #[test]
    fn good_keys_are_read_beside_bad_ones() {
        let mut reader = SectionReader::new(vec![("train", fields_of::<SftConfig>())]);
        let table = "max_steps = 4\nlearning_rate = 1\nwarmup_steps = -1".parse().unwrap();
        let config: SftConfig = reader.read("train", table);
        assert_eq!((config.max_steps, config.learning_rate, config.warmup_steps.of(8)), (Some(4), Some(1.0), 0));
        let expected = "expected a whole number of steps, or a fraction of all steps between 0 and 1";
        assert_eq!(reader.problems, [format!("[train] key \"warmup_steps\" = -1: {expected}")]);
    }

    #[test]
    fn every_unknown_key_is_told_the_nearest() {
        assert_eq!(
            problems("train", "learning_rat = 1e-4\nmaxsteps = 3\nr = 8\nseed = 1\nlora_alfa = 2\nbf16 = true"),
            [
                "[train] key \"bf16\" is unknown; write dtype = \"bf16\" in [model]",
                "[train] key \"learning_rat\" is unknown; nearest: \"learning_rate\"",
                "[train] key \"lora_alfa\" is unknown; nearest: \"lora_alpha\" in [lora]",
                "[train] key \"maxsteps\" is unknown; nearest: \"max_steps\"",
                "[train] key \"r\" is unknown; r belongs in [lora]",
                "[train] key \"seed\" is unknown; write seed at the top of the file, before the first section",
            ]
        );
    }

    #[test]
    fn keys_of_other_trainers_are_answered_by_meaning() {
        assert_eq!(
            problems(
                "train",
                "epochs = 2\nlr = 1e-4\nbatch_size = 4\ngroup_by_length = true\nlabel_smoothing_factor = 0.1\n\
                 max_length = 512\nmetric_for_best_model = \"accuracy\"\nscheduler_type = \"cosine\"\nlora_rank = 8"
            ),
            [
                "[train] key \"batch_size\" is unknown; the key is \"per_device_train_batch_size\"",
                "[train] key \"epochs\" is unknown; the key is \"num_train_epochs\"",
                "[train] key \"group_by_length\" is unknown; rows are never padded, so grouping them by length saves \
                 nothing; remove it",
                "[train] key \"label_smoothing_factor\" is unknown; the loss is cross-entropy without label smoothing; \
                 remove it",
                "[train] key \"lora_rank\" is unknown; the key is \"r\" in [lora]",
                "[train] key \"lr\" is unknown; the key is \"learning_rate\"",
                "[train] key \"max_length\" is unknown; write max_seq_length in [model], and overlong = \"truncate\" in \
                 [data] to cut longer rows as TRL does",
                "[train] key \"metric_for_best_model\" is unknown; the best model is the one with the lowest evaluation \
                 loss; remove it",
                "[train] key \"scheduler_type\" is unknown; nearest: \"lr_scheduler_type\"",
            ]
        );
    }

    #[test]
    fn a_key_that_asks_for_what_is_always_so_is_accepted() {
        let neutral = "group_by_length = false\nlabel_smoothing_factor = 0\nmetric_for_best_model = \"eval_loss\"\n\
                       greater_is_better = false\ntrust_remote_code = false";
        assert_eq!(problems("train", neutral), [""; 0]);
    }

    #[test]
    fn every_wrong_type_names_key_value_and_what_was_expected() {
        assert_eq!(
            problems("train", "max_steps = \"ten\"\nlearning_rate = true\nlr_scheduler_type = \"cosin\""),
            [
                "[train] key \"learning_rate\" = true: expected a number",
                "[train] key \"lr_scheduler_type\" = \"cosin\": expected one of constant, constant_with_warmup, linear, \
                 cosine, cosine_with_restarts, inverse_sqrt, warmup_stable_decay, cosine_with_min_lr; nearest: \"cosine\"",
                "[train] key \"max_steps\" = \"ten\": expected a whole number, 0 or above",
            ]
        );
        assert_eq!(
            problems("train", "optim = \"adamw_8bits\"\nlr_scheduler_kwargs = { min_lr = 1e-5, num_cycle = 2 }"),
            [
                "[train] key \"lr_scheduler_kwargs\": \"num_cycle\" is unknown; known: num_cycles, timescale, \
                 num_decay_steps, decay_ratio, decay_type, warmup_type, min_lr_ratio, min_lr, min_lr_rate; nearest: \
                 \"num_cycles\"",
                "[train] key \"optim\" = \"adamw_8bits\": expected one of adamw, adamw_hf, adamw_torch, adamw_torch_fused, \
                 adamw_8bit, adamw_bnb_8bit, paged_adamw_8bit, lion, lion_32bit, lion_8bit, paged_lion_8bit, sgd; \
                 nearest: \"adamw_8bit\"",
            ]
        );
        assert_eq!(
            problems("lora", "use_rslora = 1\nlayers_to_transform = \"x\""),
            [
                "[lora] key \"layers_to_transform\" = \"x\": layers_to_transform must be a block number or a list of them",
                "[lora] key \"use_rslora\" = 1: expected true or false",
            ]
        );
    }
}
