use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Formats a time like Python's `strftime` in the C locale and UTC, for the directives that need no time zone.
pub(super) fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let date = Date::from_days(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        out += &match directive {
            Some('Y') => date.year.to_string(),
            Some('y') => format!("{:02}", date.year % 100),
            Some('m') => format!("{:02}", date.month),
            Some('B') => date.month_name().to_owned(),
            Some('b' | 'h') => date.month_name()[..3].to_owned(),
            Some('d') => format!("{:02}", date.day),
            Some('e') => format!("{:2}", date.day),
            Some('j') => format!("{:03}", date.day_of_year),
            Some('A') => date.weekday.to_owned(),
            Some('a') => date.weekday[..3].to_owned(),
            Some('F') => format!("{}-{:02}-{:02}", date.year, date.month, date.day),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{hour12:02}"),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let name = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now: %{name} in {format:?} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(out)
}

struct Date {
    year: u64,
    /// The month, from 1.
    month: u64,
    /// The day, from 1.
    day: u64,
    /// The day of the year, from 1.
    day_of_year: u64,
    weekday: &'static str,
}

impl Date {
    /// Returns the Gregorian date a number of days after 1970-01-01, a Thursday.
    fn from_days(days: u64) -> Self {
        let weekday = WEEKDAYS[((days + 4) % 7) as usize];
        let (mut year, mut day) = (1970, days);
        while day >= days_in_year(year) {
            day -= days_in_year(year);
            year += 1;
        }
        let day_of_year = day + 1;
        let mut month = 1;
        while day >= days_in_month(year, month) {
            day -= days_in_month(year, month);
            month += 1;
        }
        Date { year, month, day: day + 1, day_of_year, weekday }
    }

    fn month_name(&self) -> &'static str {
        MONTHS[(self.month - 1) as usize]
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)).expect("supported")
    }

    /// Seconds and texts from `date -u -d @SECONDS`.
    #[test]
    fn dates_are_those_of_date() {
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S %j"), "Thursday 01 January 1970 00:00:00 001");
        assert_eq!(at(951_782_400, "%a %e %b %y %I %p"), "Tue 29 Feb 00 12 AM");
        assert_eq!(at(1_721_999_999, "%d %b %Y, %T"), "26 Jul 2024, 13:19:59");
        assert_eq!(at(4_102_444_799, "%F %j %I%p 100%%"), "2099-12-31 365 11PM 100%");
    }

    #[test]
    fn an_unknown_directive_is_named() {
        let error = strftime("%d %Q", UNIX_EPOCH).expect_err("unknown");
        assert_eq!(error.detail(), Some("strftime_now: %Q in \"%d %Q\" is not supported"));
    }
}
