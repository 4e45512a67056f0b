//! Variables of an environment, and their errors.

use crate::Error;

pub(super) struct Variables<'a> {
    pub(super) get: &'a dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    /// Returns the trimmed value of a variable; an empty one is not set.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        (self.get)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<usize>, Error> {
        let number = |text: String| {
            text.parse().map_err(|_| Error::Variables(format!("{name} is \"{text}\", which is not a whole number")))
        };
        self.text(name).map(number).transpose()
    }

    pub(super) fn port(&self, name: &str) -> Result<Option<u16>, Error> {
        let port = |text: String| match text.parse() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(Error::Variables(format!("{name} is \"{text}\", which is no port (1 to 65535)"))),
        };
        self.text(name).map(port).transpose()
    }

    /// Returns the error for a variable that is missing beside another.
    pub(super) fn lacks(&self, is_set: &str, is_missing: &str) -> Error {
        let value = self.text(is_set).unwrap_or_default();
        Error::Variables(format!(
            "{is_set} is {value}, but {is_missing} is not set; start all ranks with a launcher, or unset {is_set}"
        ))
    }
}
