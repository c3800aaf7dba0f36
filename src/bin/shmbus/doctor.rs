//! `shmbus doctor`: what is wrong on this machine, and the mend.

use shmbus::doctor::{Severity, examine};

use crate::output::{json_line, line};
use crate::{Ended, Globals};

/// Tell what is wrong on this machine and how to mend it: the kernel, limits, what dead buses left behind, and for each bus
/// who is stopped, dead or in the way.
///
/// One line a finding; exit code 1 where there is an error or a warning, 0 where there is nothing but notes. Looks at every
/// bus in the socket directory, or at the one that --bus names, and starts none. With --json: {severity ("error",
/// "warning", "note"), subject, finding, mend}.
#[derive(clap::Args)]
#[command(after_help = "Example: shmbus doctor")]
pub(crate) struct Args {}

pub(crate) fn run(globals: &Globals, _args: Args) -> anyhow::Result<Ended> {
    let findings = examine(globals.bus.as_deref(), globals.dir.as_deref());
    for finding in &findings {
        if globals.json { json_line(finding)? } else { line(finding)? }
    }
    if findings.iter().any(|finding| finding.severity != Severity::Note) {
        return Ok(Ended::Badly);
    }
    if !globals.json {
        line("nothing is wrong")?;
    }
    Ok(Ended::Well)
}
