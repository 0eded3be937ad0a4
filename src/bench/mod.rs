//! The measuring phases: they run at EL2 on the first CPU, the *controller*, which runs no guest itself.
//!
//! Each suite builds a `scene` (a VM with the built-in guest in it), posts operations to its vCPUs and sleeps until they
//! are done; what it finds is printed as one line of JSON a result ([`report`]), so that a board without a host tells the
//! same as QEMU does.

mod age;
mod ages;
mod checkpoint;
mod churn;
mod clock;
mod comparison;
mod cycle;
mod dirty;
mod epochs;
mod exit;
mod get;
mod heat;
mod ipi;
mod lines;
mod linux;
mod listen;
mod lives;
mod moves;
pub mod params;
mod private;
mod protect;
pub mod report;
mod scene;
mod selftest;
mod shadow;
mod share;
mod split;
mod starve;
mod storm;
mod verify;
mod words;

use alloc::string::String;

use crate::arch;
use crate::arch::mitigations::Setting;
use crate::vm::{Host, console};
use params::{Params, Suite};

/// A run went as it should, but what it verified does not hold.
const FAILED: u32 = 1;

/// Why a suite ended early, in one line.
type Refusal = String;

/// What can be run, beside what the boot arguments say.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// The built-in guest.
    pub guest: &'a [u8],
    /// The machine's initial RAM disk: kernel and RAM disk of a guest.
    pub bundle: Option<&'a [u8]>,
}

/// What `arguments` say of mitigations, for CPUs that come up before arguments are judged.
pub fn mitigations(arguments: &str) -> Setting {
    let (arguments, _) = arguments.split_once(" -- ").unwrap_or((arguments, ""));
    Params::parse(arguments).unwrap_or_default().mitigations
}

/// Runs what the boot arguments say and returns the run's status. What stands behind ` -- ` in them is a guest's.
pub fn main(host: &'static Host, arguments: &str, images: Images<'_>) -> Result<u32, Refusal> {
    let (arguments, guest_arguments) = arguments.split_once(" -- ").unwrap_or((arguments, ""));
    let params = Params::parse(arguments)?;
    let enough = host.cpus().saturating_sub(1);
    if let Some(most) = params.vcpus.iter().max()
        && *most > enough
        && !params.suites.iter().copied().all(shares_cpus)
    {
        return Err(alloc::format!(
            "{most} vCPUs need {} CPUs, one of them for the controller; this machine has {}",
            most + 1,
            enough + 1
        ));
    }
    let stage = scene::Stage {
        host,
        params: &params,
        guest: images.guest,
        bundle: images.bundle,
        guest_arguments,
        bbm: params.bbm_levels(host.features.bbm, host.auto_bbm())?,
        trackers: params.trackers(host.services.hardware, host.auto_engine())?,
        access_flag: params.access_flags(host.services.hardware, host.auto_access_flag())?,
    };
    let outcome = run_all(&stage);
    arch::hint_unmeasured();
    console::finish();
    Ok(if outcome? { 0 } else { FAILED })
}

fn run_all(stage: &scene::Stage<'_>) -> Result<bool, Refusal> {
    let mut good = true;
    for suite in &stage.params.suites {
        arch::hint_measured();
        if !run(*suite, stage)? {
            ::log::error!(
                "suite {}: what it verifies does not hold, see its rows",
                suite.name()
            );
            good = false;
        }
    }
    Ok(good)
}

/// Whether vCPUs need no CPUs of their own in a suite.
const fn shares_cpus(suite: Suite) -> bool {
    matches!(
        suite,
        Suite::None | Suite::Selftest | Suite::Share | Suite::Storm | Suite::Lives
    )
}

/// Runs one suite; false where what it verifies does not hold.
fn run(suite: Suite, stage: &scene::Stage<'_>) -> Result<bool, Refusal> {
    match suite {
        Suite::None => Ok(true),
        Suite::Dirty => dirty::run(stage),
        Suite::Verify => verify::run(stage),
        Suite::Selftest => selftest::run(stage),
        Suite::Get => get::run(stage),
        Suite::Starve => starve::run(stage),
        Suite::Split => split::run(stage),
        Suite::Churn => churn::run(stage),
        Suite::Protect => protect::run(stage),
        Suite::Checkpoint => checkpoint::run(stage),
        Suite::Epochs => epochs::run(stage),
        Suite::Age => age::run(stage),
        Suite::Heat => heat::run(stage),
        Suite::Ages => ages::run(stage),
        Suite::Share => share::run(stage),
        Suite::Moves => moves::run(stage),
        Suite::Storm => storm::run(stage),
        Suite::Lives => lives::run(stage),
        Suite::Exit => exit::run(stage),
        Suite::Ipi => ipi::run(stage),
        Suite::Linux => linux::run(stage),
        Suite::Private => private::run(stage),
        Suite::Lines => lines::run(stage),
    }
}
