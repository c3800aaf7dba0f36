//! What the demo shows: headings, findings, progress on a terminal; or JSON lines.

use std::io;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::output;

pub(super) struct Screen {
    json: bool,
}

/// A step's result as `--json` prints it; what was found lies beside these two fields.
#[derive(Serialize)]
struct StepLine<'a, F: Serialize> {
    step: &'a str,
    ok: bool,
    #[serde(flatten)]
    found: &'a F,
}

impl Screen {
    pub(super) fn new(json: bool) -> Screen {
        Screen { json }
    }

    /// For people only.
    pub(super) fn line(&self, text: &str) -> io::Result<()> {
        if self.json { Ok(()) } else { output::line(text) }
    }

    pub(super) fn heading(&self, number: u32, text: &str) -> io::Result<()> {
        self.line(&format!("\n{number}  {text}"))
    }

    /// Something that was checked and holds.
    pub(super) fn holds(&self, text: &str) -> io::Result<()> {
        self.line(&format!("   ✓ {text}"))
    }

    /// A step that is passed.
    pub(super) fn passed(&self, step: &str, found: &impl Serialize) -> io::Result<()> {
        if self.json { output::json_line(&StepLine { step, ok: true, found }) } else { Ok(()) }
    }

    /// A bar on a terminal's standard error; nothing elsewhere.
    pub(super) fn bar(&self, len: u64, unit: &str) -> ProgressBar {
        if self.json {
            return ProgressBar::hidden();
        }
        let template = match unit {
            "B" => "   {bar:40} {binary_bytes}/{binary_total_bytes}".to_owned(),
            _ => format!("   {{bar:40}} {{human_pos}}/{{human_len}} {unit}"),
        };
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(len).with_style(style)
    }
}
