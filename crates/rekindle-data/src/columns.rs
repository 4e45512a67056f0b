use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::message::quoted_keys;
use crate::row::{BESIDE, SHAPES};

/// The file's columns for the keys of the known row formats: `prompt` → `question`.
///
/// If keys of a format are mapped, the file's own columns of other formats are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Columns {
    /// The file's column for each of our keys.
    of: BTreeMap<String, String>,
    /// Keys of the formats that no mapped key belongs to.
    ignored: Vec<&'static str>,
    /// True if every other column of a file is kept too.
    keeps_all: bool,
}

/// The mapped columns of a row, one bit each.
pub(crate) type Found = u32;

impl Columns {
    /// Maps keys to the file's columns.
    ///
    /// # Errors
    /// [`Error::Options`] for a key that no format has, or a column that is mapped twice.
    pub fn new(of: BTreeMap<String, String>) -> Result<Self> {
        let known = || SHAPES.iter().flat_map(|(_, keys)| keys.iter()).chain(&BESIDE);
        if let Some(wrong) = of.keys().find(|key| !known().any(|known| known == key)) {
            let known = known().copied().collect::<Vec<_>>().join(", ");
            return Err(Error::Options(format!("columns: {wrong:?} is not a key of a row; known: {known}")));
        }
        for (key, column) in &of {
            if let Some((other, _)) = of.iter().find(|(other, theirs)| *other != key && *theirs == column) {
                return Err(Error::Options(format!(
                    "columns: {column:?} is mapped to both {key:?} and {other:?}; \
                     remove one of them"
                )));
            }
        }
        let is_mapped = |keys: &[&str]| keys.iter().any(|key| of.contains_key(*key));
        let ignored: Vec<_> = match SHAPES.iter().any(|(_, keys)| is_mapped(keys)) {
            true => {
                SHAPES.iter().filter(|(_, keys)| !is_mapped(keys)).flat_map(|(_, keys)| keys.iter().copied()).collect()
            }
            false => Vec::new(),
        };
        Ok(Columns { of, ignored, keeps_all: false })
    }

    /// Returns this mapping, with every other column of a file kept under its own name.
    pub(crate) fn keeping_all(&self) -> Self {
        Columns { of: self.of.clone(), ignored: Vec::new(), keeps_all: true }
    }

    /// Returns the file's column for each key.
    pub fn as_map(&self) -> &BTreeMap<String, String> {
        &self.of
    }

    /// Returns true if nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// Renames the columns of a row to the keys.
    pub(crate) fn apply(&self, fields: &mut Map<String, Value>) -> Result<Found, String> {
        if self.of.is_empty() {
            return Ok(0);
        }
        let mut found = 0;
        let mut mapped = Map::new();
        for (bit, (key, column)) in self.of.iter().enumerate() {
            match fields.shift_remove(column) {
                Some(value) => {
                    found |= 1 << bit;
                    mapped.insert(key.clone(), value);
                }
                None if is_optional(key) => {}
                None => return Err(format!("has no {column:?} (for {key:?}); its keys: {}", quoted_keys(fields))),
            }
        }
        fields.retain(|key, _| !self.of.contains_key(key) && !self.ignored.contains(&key.as_str()));
        fields.extend(mapped);
        Ok(found)
    }

    /// Returns the message for a mapped column that no row has.
    pub(crate) fn missing(&self, found: Found) -> Option<String> {
        let (_, (key, column)) = self.of.iter().enumerate().find(|(bit, _)| found & (1 << bit) == 0)?;
        Some(format!("no row has {column:?} (for {key:?}); correct columns, or remove {key:?}"))
    }

    /// Checks a table's columns before any row of it is read.
    pub(crate) fn check_table(&self, columns: &[&str]) -> Result<(), String> {
        let there = || columns.iter().map(|column| format!("{column:?}")).collect::<Vec<_>>().join(", ");
        match self.of.iter().find(|(_, column)| !columns.contains(&column.as_str())) {
            Some((key, column)) => Err(format!("has no column {column:?} (for {key:?}); its columns: {}", there())),
            None if columns.iter().any(|column| self.is_read(column)) => Ok(()),
            None => Err(format!("has no column that Rekindle reads; its columns: {}", there())),
        }
    }

    /// Returns the key that a column of a table is mapped to.
    pub(crate) fn key_of<'a>(&'a self, column: &'a str) -> &'a str {
        self.of.iter().find(|(_, mapped)| *mapped == column).map_or(column, |(key, _)| key)
    }

    /// Returns true if rows use this column of a table.
    pub(crate) fn is_read(&self, column: &str) -> bool {
        let is_known = SHAPES.iter().any(|(_, keys)| keys.contains(&column)) || BESIDE.contains(&column);
        self.of.values().any(|mapped| mapped == column)
            || self.keeps_all
            || (is_known && !self.of.contains_key(column) && !self.ignored.contains(&column))
    }
}

/// Returns true if a row may lack the key, which belongs to no format.
fn is_optional(key: &str) -> bool {
    BESIDE.contains(&key)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::row::object;

    fn columns(pairs: &[(&str, &str)]) -> Columns {
        let pairs = pairs.iter().map(|(key, column)| ((*key).to_owned(), (*column).to_owned()));
        Columns::new(pairs.collect()).expect("known keys")
    }

    fn apply(columns: &Columns, row: Value) -> Result<(Value, Found), String> {
        let mut fields = object(row)?;
        let found = columns.apply(&mut fields)?;
        Ok((fields.into(), found))
    }

    #[test]
    fn mapped_columns_take_our_names_and_their_shape_wins() {
        let mapped = columns(&[("prompt", "question"), ("completion", "answer")]);
        let row = json!({"question": "q", "answer": "a", "messages": [], "prompt": "unused", "id": 1});
        let (row, found) = apply(&mapped, row).expect("both are there");
        assert_eq!((row, found), (json!({"id": 1, "completion": "a", "prompt": "q"}), 0b11));
        // The other key of the format keeps its own name.
        let (row, _) =
            apply(&columns(&[("completion", "answer")]), json!({"prompt": "q", "answer": "a"})).expect("valid");
        assert_eq!(row, json!({"prompt": "q", "completion": "a"}));
        // Two names can be swapped.
        let swapped = columns(&[("prompt", "completion"), ("completion", "prompt")]);
        let (row, _) = apply(&swapped, json!({"prompt": "a", "completion": "b"})).expect("valid");
        assert_eq!(row, json!({"completion": "a", "prompt": "b"}));
    }

    #[test]
    fn a_missing_column_is_named_with_those_that_are_there() {
        let mapped = columns(&[("prompt", "question"), ("system", "persona")]);
        assert_eq!(
            apply(&mapped, json!({"query": "q", "completion": "a"})).expect_err("missing"),
            "has no \"question\" (for \"prompt\"); its keys: \"query\", \"completion\""
        );
        // What a row may lack must stand in some row.
        let (_, found) = apply(&mapped, json!({"question": "q", "completion": "a"})).expect("without a persona");
        assert_eq!(
            mapped.missing(found).expect("nowhere"),
            "no row has \"persona\" (for \"system\"); correct columns, or remove \"system\""
        );
        assert_eq!(mapped.missing(0b11), None);
        assert_eq!(
            mapped.check_table(&["question", "answer"]).expect_err("missing"),
            "has no column \"persona\" (for \"system\"); its columns: \"question\", \"answer\""
        );
    }

    #[test]
    fn keys_of_no_shape_are_refused() {
        let error = |key: &str, column: &str| {
            let of = [(key.to_owned(), column.to_owned()), ("text".to_owned(), "body".to_owned())].into();
            Columns::new(of).expect_err("refused").to_string()
        };
        assert!(error("promt", "q").starts_with(
            "columns: \"promt\" is not a key of a row; known: input_ids, \
             messages, "
        ));
        assert_eq!(
            error("prompt", "body"),
            "columns: \"body\" is mapped to both \"prompt\" and \"text\"; remove one of them"
        );
    }
}
