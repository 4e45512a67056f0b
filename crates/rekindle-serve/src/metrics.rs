//! Counters and histograms in Prometheus' text format.

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::engine::EngineStats;

/// Bounds of the histograms of times, in seconds.
const BOUNDS: [f64; 18] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// The metrics of the server.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) prompt_tokens: Counter,
    pub(crate) generation_tokens: Counter,
    pub(crate) finished_stop: Counter,
    pub(crate) finished_length: Counter,
    pub(crate) finished_abort: Counter,
    pub(crate) finished_error: Counter,
    pub(crate) first_token: Histogram,
    pub(crate) between_tokens: Histogram,
    pub(crate) request: Histogram,
    /// Responses by status.
    responses: Mutex<Vec<(u16, u64)>>,
}

/// A total.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A histogram of times.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BOUNDS.len()],
    count: AtomicU64,
    microseconds: AtomicU64,
}

impl Histogram {
    pub(crate) fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(bucket) = BOUNDS.iter().position(|&bound| seconds <= bound) {
            self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.microseconds.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }
}

impl Metrics {
    pub(crate) fn responded(&self, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match responses.iter_mut().find(|(known, _)| *known == status) {
            Some((_, count)) => *count += 1,
            None => responses.push((status, 1)),
        }
    }

    /// Returns the text of `/metrics`.
    pub(crate) fn text(&self, model: &str, stats: &EngineStats, adapters: &[String]) -> String {
        let mut page = Page { text: String::new(), model: escape(model) };
        page.one("gauge", "num_requests_running", "Requests in the batch.", stats.running as f64);
        page.one("gauge", "num_requests_waiting", "Requests in the queue.", stats.waiting as f64);
        page.one("gauge", "kv_cache_usage_perc", "Used share of the key/value cache, 0 to 1.", stats.kv_cache_usage);
        let queries = stats.prefix_cache_queries as f64;
        page.one("counter", "prefix_cache_queries_total", "Tokens looked up in the prefix cache.", queries);
        let hits = stats.prefix_cache_hits as f64;
        page.one("counter", "prefix_cache_hits_total", "Tokens found in the prefix cache.", hits);
        page.one("counter", "num_preemptions_total", "Requests preempted and recomputed.", stats.preemptions as f64);
        page.one("counter", "prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens.get() as f64);
        page.one("counter", "generation_tokens_total", "New tokens.", self.generation_tokens.get() as f64);
        let reasons = [
            ("stop", &self.finished_stop),
            ("length", &self.finished_length),
            ("abort", &self.finished_abort),
            ("error", &self.finished_error),
        ];
        page.head("counter", "request_success_total", "Samples that ended, by reason.");
        for (reason, counter) in reasons {
            page.line("request_success_total", &format!("finished_reason=\"{reason}\""), counter.get() as f64);
        }
        page.head("counter", "http_responses_total", "Responses by status.");
        for (status, count) in self.responses.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            page.line("http_responses_total", &format!("status=\"{status}\""), *count as f64);
        }
        page.head("gauge", "lora_requests_info", "Loaded adapters.");
        for name in adapters {
            page.line("lora_requests_info", &format!("lora_name=\"{}\"", escape(name)), 1.0);
        }
        page.histogram("time_to_first_token_seconds", "Time to the first token of a sample.", &self.first_token);
        page.histogram("inter_token_latency_seconds", "Time between tokens of a sample.", &self.between_tokens);
        page.histogram("e2e_request_latency_seconds", "Time to the end of a sample.", &self.request);
        page.text
    }
}

struct Page {
    text: String,
    model: String,
}

impl Page {
    fn head(&mut self, kind: &str, name: &str, help: &str) {
        let _ = write!(self.text, "# HELP rekindle:{name} {help}\n# TYPE rekindle:{name} {kind}\n");
    }

    fn line(&mut self, name: &str, label: &str, value: f64) {
        let separator = if label.is_empty() { "" } else { "," };
        let _ = writeln!(self.text, "rekindle:{name}{{model_name=\"{}\"{separator}{label}}} {value}", self.model);
    }

    fn one(&mut self, kind: &str, name: &str, help: &str, value: f64) {
        self.head(kind, name, help);
        self.line(name, "", value);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head("histogram", name, help);
        let mut total = 0;
        for (bound, bucket) in BOUNDS.iter().zip(&histogram.buckets) {
            total += bucket.load(Ordering::Relaxed);
            self.line(&format!("{name}_bucket"), &format!("le=\"{bound}\""), total as f64);
        }
        let count = histogram.count.load(Ordering::Relaxed) as f64;
        self.line(&format!("{name}_bucket"), "le=\"+Inf\"", count);
        let seconds = histogram.microseconds.load(Ordering::Relaxed) as f64 / 1e6;
        self.line(&format!("{name}_sum"), "", seconds);
        self.line(&format!("{name}_count"), "", count);
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_of_prometheus() {
        let metrics = Metrics::default();
        metrics.prompt_tokens.add(7);
        metrics.responded(200);
        metrics.responded(200);
        metrics.first_token.observe(Duration::from_millis(3));
        metrics.first_token.observe(Duration::from_secs(500));
        let stats = EngineStats { kv_cache_usage: 0.5, ..EngineStats::default() };
        let text = metrics.text("a\"b", &stats, &["sql".to_owned()]);
        for line in [
            "# TYPE rekindle:prompt_tokens_total counter",
            "rekindle:prompt_tokens_total{model_name=\"a\\\"b\"} 7",
            "rekindle:kv_cache_usage_perc{model_name=\"a\\\"b\"} 0.5",
            "rekindle:http_responses_total{model_name=\"a\\\"b\",status=\"200\"} 2",
            "rekindle:lora_requests_info{model_name=\"a\\\"b\",lora_name=\"sql\"} 1",
            "rekindle:time_to_first_token_seconds_bucket{model_name=\"a\\\"b\",le=\"0.0025\"} 0",
            "rekindle:time_to_first_token_seconds_bucket{model_name=\"a\\\"b\",le=\"0.005\"} 1",
            "rekindle:time_to_first_token_seconds_bucket{model_name=\"a\\\"b\",le=\"+Inf\"} 2",
            "rekindle:time_to_first_token_seconds_sum{model_name=\"a\\\"b\"} 500.003",
            "rekindle:time_to_first_token_seconds_count{model_name=\"a\\\"b\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
