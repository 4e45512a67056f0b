//! The budget of a rendering: an untrusted template can loop forever, or exceed the memory.

use std::io;

use minijinja::{Environment, Error, ErrorKind, Value};

use super::RenderOptions;
use super::values::size;
use crate::message::Message;

/// The number of engine steps: an instruction, a visited element, or 64 bytes of text that is created or searched.
const STEPS: u64 = 1_000_000;
/// Further steps for each byte and for each message of the conversation. The latter allow templates to visit every
/// message for every message.
const STEPS_PER_BYTE: u64 = 100;
const STEPS_PER_MESSAGE: u64 = 25_000;
/// Bytes of output: a base for any conversation, and more for each byte of it.
const OUTPUT: usize = 16 << 20;
const OUTPUT_PER_BYTE: usize = 16;

/// Steps of a rendering on the caller's stack, which may have 2 MiB. A level of nesting takes at least 8 steps, and up
/// to 1 KiB of the stack to visit and free (measured without optimization).
const STEPS_ON_THE_STACK: u64 = 10_000;
const STACK_PER_STEP: usize = 128;
const LARGEST_STACK: usize = 1 << 30;

/// A part of the message about a stopped rendering, which distinguishes it from other failures.
pub(crate) const STOPPED: &str = "the limit for a conversation of this size";

/// The budget of one rendering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    steps: u64,
    output: usize,
}

impl Budget {
    /// Returns the budget of a conversation.
    pub(super) fn of(messages: &[Message], options: &RenderOptions) -> Self {
        let of_message = |message: &Message| {
            let extra: usize = message.extra.iter().map(|(name, value)| name.len() + size(value)).sum();
            64 + message.content.as_deref().map_or(0, str::len) + extra
        };
        let of_messages = STEPS_PER_MESSAGE.saturating_mul(messages.len() as u64);
        let messages: usize = messages.iter().map(of_message).sum();
        let kwargs: usize = options.kwargs.values().map(size).sum();
        let bytes = messages + kwargs + options.tools.as_ref().map_or(0, size);
        Budget {
            steps: STEPS.saturating_add(of_messages).saturating_add(STEPS_PER_BYTE.saturating_mul(bytes as u64)),
            output: OUTPUT.saturating_add(OUTPUT_PER_BYTE.saturating_mul(bytes)),
        }
    }

    /// Renders a template of the environment within the budget.
    pub(super) fn render(
        self,
        environment: &Environment<'static>,
        name: &str,
        context: &Value,
    ) -> Result<String, String> {
        // Nearly every conversation is rendered with few steps. What can be nested deeply with many steps needs a stack of
        // its own, for a value is freed by recursion.
        match attempt(environment, name, context, self.steps.min(STEPS_ON_THE_STACK), self.output) {
            Err(Failure::Steps) if self.steps > STEPS_ON_THE_STACK => {}
            rendered => return rendered.map_err(|failure| self.describe(failure)),
        }
        let stack_size =
            usize::try_from(self.steps).unwrap_or(usize::MAX).saturating_mul(STACK_PER_STEP).min(LARGEST_STACK);
        let rendered = std::thread::scope(|scope| {
            let render = || attempt(environment, name, context, self.steps, self.output);
            let thread = std::thread::Builder::new().stack_size(stack_size).spawn_scoped(scope, render);
            thread.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let rendered = rendered.map_err(|error| format!("no thread to render it: {error}"))?;
        rendered.map_err(|failure| self.describe(failure))
    }

    fn describe(self, failure: Failure) -> String {
        match failure {
            Failure::Steps => {
                format!("it took more than {} steps, {STOPPED}; does it loop for ever?", grouped(self.steps))
            }
            Failure::Output => {
                format!("it wrote more than {} bytes, {STOPPED}; does it repeat itself?", grouped(self.output as u64))
            }
            Failure::Other(message) => message,
        }
    }
}

enum Failure {
    Steps,
    Output,
    Other(String),
}

fn attempt(
    environment: &Environment<'static>,
    name: &str,
    context: &Value,
    steps: u64,
    output: usize,
) -> Result<String, Failure> {
    // A clone shares everything but the number of steps.
    let mut environment = environment.clone();
    environment.set_fuel(Some(steps));
    let template = environment.get_template(name).expect("added when the template was read");
    let mut out = Limited { bytes: Vec::new(), limit: output, full: false };
    let rendered = template.render_captured_to(context.clone(), &mut out).map(|_| ());
    match rendered {
        _ if out.full => Err(Failure::Output),
        Ok(()) => Ok(String::from_utf8(out.bytes).expect("the engine writes text")),
        Err(error) if is_out_of_fuel(&error) => Err(Failure::Steps),
        Err(error) => Err(Failure::Other(super::describe(&error))),
    }
}

fn is_out_of_fuel(error: &Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return true;
        }
        source = error.source();
    }
    false
}

/// A writer that ends at a limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
    full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            self.full = true;
            return Err(io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Formats a number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
