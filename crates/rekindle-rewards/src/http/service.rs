//! The client of a scoring service.

use core::time::Duration;
use std::thread;

use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig};

use super::HttpRewardConfig;
use crate::exchange::{ScoreRequest, excerpt, read_reply};
use crate::{Reward, RewardError, Sample};

/// The largest reply that is read, in bytes.
const REPLY_LIMIT: u64 = 64 << 20;

/// An [`HttpRewardConfig`] with its connections.
#[derive(Debug)]
pub(super) struct HttpReward {
    name: String,
    config: HttpRewardConfig,
    /// The value of the header `Authorization`.
    authorization: Option<String>,
    agent: Agent,
    /// The pause before the first retry.
    first_pause: Duration,
    /// The number of the last request.
    last_id: u64,
}

/// An attempt that failed.
enum AttemptFailure {
    /// A busy service or a failed connection.
    Temporary(String),
    /// A failure that another attempt would repeat.
    Lasting(String),
}

impl HttpReward {
    pub(super) fn new(name: String, config: &HttpRewardConfig) -> Result<Self, RewardError> {
        let token = |variable: &String| {
            std::env::var(variable).map_err(|_| {
                RewardError::config(&*name, format!("token_env = {variable:?}: this environment variable is not set"))
            })
        };
        let authorization = config.token_env.as_ref().map(token).transpose()?.map(|token| format!("Bearer {token}"));
        let agent = Agent::config_builder()
            .timeout_global(Some(Duration::from_secs_f64(config.timeout)))
            .http_status_as_error(false)
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .build()
            .new_agent();
        Ok(Self { name, config: config.clone(), authorization, agent, first_pause: Duration::from_secs(1), last_id: 0 })
    }

    /// Sends a request until the service replies, and returns the reply's text.
    fn post(&self, body: &str) -> Result<String, RewardError> {
        let mut pause = self.first_pause;
        for attempt in 0.. {
            match self.attempt(body) {
                Ok(text) => return Ok(text),
                Err(AttemptFailure::Temporary(_)) if attempt < self.config.retries => {}
                Err(AttemptFailure::Temporary(problem)) if attempt > 0 => {
                    let attempts = attempt + 1;
                    return Err(RewardError::failed(&*self.name, format!("{problem}, in each of {attempts} attempts")));
                }
                Err(AttemptFailure::Temporary(problem) | AttemptFailure::Lasting(problem)) => {
                    return Err(RewardError::failed(&*self.name, problem));
                }
            }
            thread::sleep(pause);
            pause *= 2;
        }
        unreachable!("the last attempt returns")
    }

    fn attempt(&self, body: &str) -> Result<String, AttemptFailure> {
        let url = &self.config.url;
        let mut request = self.agent.post(url).header("Content-Type", "application/json");
        for (name, value) in &self.config.headers {
            request = request.header(name, value);
        }
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let mut response = request.send(body).map_err(|error| match error {
            ureq::Error::Timeout(_) => AttemptFailure::Temporary(format!(
                "{url} did not reply within {} s; raise timeout, or score fewer completions at once",
                self.config.timeout
            )),
            ureq::Error::Io(_) | ureq::Error::ConnectionFailed | ureq::Error::HostNotFound => {
                AttemptFailure::Temporary(format!("cannot reach {url}: {error}"))
            }
            other => AttemptFailure::Lasting(format!("cannot send to {url}: {other}")),
        })?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(REPLY_LIMIT).read_to_string();
        let text = text.map_err(|error| AttemptFailure::Temporary(format!("the reply of {url} broke off: {error}")))?;
        match status {
            200..300 => Ok(text),
            429 | 502 | 503 | 504 => {
                Err(AttemptFailure::Temporary(format!("{url} replied with status {status}: {}", excerpt(&text))))
            }
            _ => Err(AttemptFailure::Lasting(format!("{url} replied with status {status}: {}", excerpt(&text)))),
        }
    }

    fn score_part(&self, id: u64, part: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        let text = self.post(&ScoreRequest::new(id, part).to_line())?;
        read_reply(&self.name, &self.config.url, &text, id, part.len())
    }
}

impl Reward for HttpReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        let share = samples.len().div_ceil(self.config.concurrency);
        let first_id = self.last_id + 1;
        self.last_id += samples.chunks(share).len() as u64;
        let this = &*self;
        let parts: Vec<Result<Vec<Option<f64>>, RewardError>> = thread::scope(|scope| {
            let running: Vec<_> = (first_id..)
                .zip(samples.chunks(share))
                .map(|(id, part)| scope.spawn(move || this.score_part(id, part)))
                .collect();
            let joined = running.into_iter().map(|thread| thread.join());
            joined.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let mut scores = Vec::with_capacity(samples.len());
        for part in parts {
            scores.extend(part?);
        }
        Ok(scores)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc::{Receiver, channel};

    use serde_json::{Value, json};

    use super::*;

    /// Reads one request; returns its headers and its body.
    fn read_request(stream: &TcpStream) -> (String, Value) {
        let mut reader = BufReader::new(stream);
        let (mut headers, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap() <= 2 {
                break;
            }
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            headers.push_str(&line);
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        (headers, serde_json::from_slice(&body).unwrap())
    }

    /// The status and the body that answer a request with this body.
    type Reply = Box<dyn Fn(&Value) -> (u16, String) + Send>;

    /// Serves one connection for each reply. Returns the address and the requests, headers and body.
    fn serve(replies: Vec<Reply>) -> (String, Receiver<(String, Value)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/score", listener.local_addr().unwrap());
        let (sent, received) = channel();
        thread::spawn(move || {
            for reply in replies {
                let (mut stream, _) = listener.accept().unwrap();
                let (headers, body) = read_request(&stream);
                let (status, text) = reply(&body);
                let length = text.len();
                let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
                stream.write_all(format!("{head}{text}").as_bytes()).unwrap();
                let _ = sent.send((headers, body));
            }
        });
        (url, received)
    }

    fn score(config: &HttpRewardConfig, completions: &[&str]) -> Result<Vec<Option<f64>>, String> {
        let row = serde_json::Map::from_iter([("answer".to_owned(), json!(4))]);
        let sample = |completion: &&'static str| Sample {
            prompt: "p",
            completion,
            prompt_ids: &[],
            completion_ids: &[1, 2],
            truncated: true,
            row: &row,
            messages: None,
        };
        let completions: Vec<&'static str> = completions.iter().map(|text| &*text.to_string().leak()).collect();
        let samples: Vec<Sample> = completions.iter().map(sample).collect();
        let mut reward = HttpReward::new("judge".to_owned(), config).map_err(|error| error.to_string())?;
        reward.first_pause = Duration::from_millis(1);
        reward.score(&samples).map_err(|error| error.to_string())
    }

    fn lengths(request: &Value) -> (u16, String) {
        let length = |sample: &Value| json!(sample["completion"].as_str().unwrap().len());
        let rewards: Vec<Value> = request["samples"].as_array().unwrap().iter().map(length).collect();
        (200, json!({"id": request["id"], "rewards": rewards}).to_string())
    }

    #[test]
    fn a_batch_is_divided_and_scored() {
        let (url, received) = serve(vec![Box::new(lengths), Box::new(lengths)]);
        let mut config = HttpRewardConfig::new(url);
        config.concurrency = 2;
        config.headers.insert("X-Team".into(), "blue".into());
        assert_eq!(score(&config, &["a", "bb", "ccc"]), Ok(vec![Some(1.0), Some(2.0), Some(3.0)]));
        let (headers, body) = received.recv().unwrap();
        assert!(headers.to_lowercase().contains("x-team: blue"), "{headers}");
        assert_eq!(body["samples"][0]["row"], json!({"answer": 4}));
        assert_eq!(body["samples"][0]["completion_ids"], json!([1, 2]));
        assert_eq!(body["samples"][0]["truncated"], json!(true));
    }

    #[test]
    fn a_busy_service_is_tried_again() {
        let (url, _) = serve(vec![Box::new(|_| (503, "busy".into())), Box::new(lengths)]);
        assert_eq!(score(&HttpRewardConfig::new(url), &["a"]), Ok(vec![Some(1.0)]));
        let (url, _) = serve(vec![Box::new(|_| (429, "busy".into())), Box::new(|_| (429, "busy".into()))]);
        let config = HttpRewardConfig { retries: 1, ..HttpRewardConfig::new(url) };
        let error = score(&config, &["a"]).unwrap_err();
        assert!(error.starts_with("reward \"judge\": http://127.0.0.1"), "{error}");
        assert!(error.ends_with("replied with status 429: \"busy\", in each of 2 attempts"), "{error}");
    }

    #[test]
    fn failures_are_errors() {
        let (url, _) = serve(vec![Box::new(|_| (500, "Traceback".into()))]);
        let error = score(&HttpRewardConfig::new(url), &["a"]).unwrap_err();
        assert!(error.ends_with("replied with status 500: \"Traceback\""), "{error}");
        let (url, _) = serve(vec![Box::new(|request| (200, json!({"id": request["id"], "rewards": []}).to_string()))]);
        let error = score(&HttpRewardConfig::new(url), &["a"]).unwrap_err();
        assert!(error.contains("returned 0 scores for 1 completion"), "{error}");
        let (url, _) = serve(vec![Box::new(|_| (200, "<html>".into()))]);
        let error = score(&HttpRewardConfig::new(url), &["a"]).unwrap_err();
        assert!(error.contains("answered \"<html>\", which is not a reply such as"), "{error}");
    }

    #[test]
    fn an_absent_or_silent_service_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let config = HttpRewardConfig { timeout: 0.2, retries: 0, ..HttpRewardConfig::new(&*url) };
        let error = score(&config, &["a"]).unwrap_err();
        assert!(error.contains("did not reply within 0.2 s; raise timeout"), "{error}");
        drop(listener);
        let error = score(&config, &["a"]).unwrap_err();
        assert!(error.contains("cannot reach http://127.0.0.1"), "{error}");
        let config = HttpRewardConfig { token_env: Some("REKINDLE_NO_SUCH_TOKEN".into()), ..config };
        assert!(score(&config, &["a"]).unwrap_err().contains("this environment variable is not set"));
    }
}
