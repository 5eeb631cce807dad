//! The end of a domain: its reason, and what follows from it.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::{self, Write};

use hypercall_abi::context::UserRegs;
use hypercall_abi::domctl::info;
use hypercall_abi::sched::ShutdownReason;

use crate::config::{Action, GuestConfig};
use crate::create::Guest;
use crate::privileged::Hypervisor;
use crate::refusals;
use crate::tree::{Access, Node, Store, home, vm};

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The reason the guest gave; `None` for a number that the ABI does not define, or if the domain is gone
    /// altogether.
    pub reason: Option<ShutdownReason>,
    /// What is to happen, by the guest's configuration.
    pub action: Action,
    /// The reason in words: `crashed`.
    pub how: &'static str,
    /// A report for a person: which guest ended and why; for a crash also where, with registers.
    pub report: String,
    /// The last requests of the guest that the hypervisor refused, in words.
    pub refused: Vec<String>,
}

impl End {
    /// The report. After a crash, or if the guest has printed nothing (`silent`), the last refused requests are added:
    /// they may show why the guest ended.
    #[must_use]
    pub fn told(&self, silent: bool) -> String {
        let mut told = self.report.clone();
        if silent {
            told.push_str("\n  it had printed nothing");
        }
        if (silent || action_is_for_crash(self.reason)) && !self.refused.is_empty() {
            told.push_str("\n  the hypervisor had refused it, the last at the end:");
            self.refused.iter().for_each(|line| told.push_str(&format!("\n    {line}")));
        }
        told
    }
}

/// What a guest can be asked to do. It need not obey.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndRequest {
    /// Power off.
    Poweroff,
    /// Reboot: end, and be made again.
    Reboot,
}

/// What is left of a guest once its end has been dealt with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left.
    Gone,
    /// Nothing is left, but its configuration says that it is to be made again.
    Restart(GuestConfig),
    /// All of it is left, not running.
    Preserved(Guest),
}

/// Returns why a guest ended, or `None` if it has not ended.
///
/// # Errors
/// The hypervisor refused to tell about the domain.
pub fn end_of<H: Hypervisor>(hypervisor: &H, guest: &Guest) -> Result<Option<End>, H::Error> {
    let (name, domain) = (&guest.config.name, guest.domain);
    let Some(found) = hypervisor.info(domain)?.filter(|found| found.domain == domain.0) else {
        let how = "is gone";
        let report = format!("guest {name} (domain {domain}) {how}");
        return Ok(Some(End { reason: None, action: Action::Destroy, how, report, refused: vec![] }));
    };
    if found.flags & info::SHUTDOWN == 0 {
        return Ok(None);
    }
    let number = found.flags >> info::SHUTDOWN_SHIFT & 0xff;
    let reason = ShutdownReason::from_number(u64::from(number));
    let config = &guest.config;
    let (how, action) = match reason {
        Some(ShutdownReason::Poweroff) => ("powered off", config.on_poweroff),
        Some(ShutdownReason::Reboot) => ("rebooted", config.on_reboot),
        // There is no resume yet, so a suspension counts as a power-off.
        Some(ShutdownReason::Suspend) => ("suspended itself", config.on_poweroff),
        Some(ShutdownReason::Crash) => ("crashed", config.on_crash),
        Some(ShutdownReason::Watchdog) => ("missed its watchdog", config.on_watchdog.unwrap_or(config.on_crash)),
        Some(ShutdownReason::SoftReset) => ("asked for a soft reset", config.on_crash),
        None => ("ended for an unknown reason", config.on_crash),
    };
    let mut report = format!("guest {name} (domain {domain}) {how}");
    if action_is_for_crash(reason) {
        describe_crash(hypervisor, guest, &mut report)?;
    }
    let refused = refusals::lines(&hypervisor.refusals(domain)?);
    Ok(Some(End { reason, action, how, report, refused }))
}

fn action_is_for_crash(reason: Option<ShutdownReason>) -> bool {
    use ShutdownReason::{Poweroff, Reboot, Suspend};
    !matches!(reason, Some(Poweroff | Reboot | Suspend))
}

/// Adds to `report` what the hypervisor recorded of a crash, and the registers of the vcpu that crashed, if available.
fn describe_crash<H: Hypervisor>(hypervisor: &H, guest: &Guest, report: &mut String) -> Result<(), H::Error> {
    let said = hypervisor.crash_report(guest.domain)?;
    let vcpu = said.as_ref().map_or(0, |(vcpu, _)| *vcpu);
    if let Some((vcpu, text)) = said {
        // The report goes to a terminal, and the guest may have influenced the text.
        let text = text.replace(|c: char| !c.is_ascii_graphic() && c != ' ', "?");
        report.push_str(&format!(": vcpu {vcpu}: {text}"));
    } else {
        report.push_str(": the guest itself said so");
    }
    match hypervisor.vcpu(guest.domain, vcpu) {
        // Writing to a string does not fail.
        Ok(context) => drop(write!(report, "{}", Registers(&context.user_regs, context.ctrlreg[3]))),
        Err(error) => report.push_str(&format!("\n  no registers: {error}")),
    }
    Ok(())
}

/// The general registers, four to a line, and the address of the root table.
struct Registers<'a>(&'a UserRegs, u64);

impl fmt::Display for Registers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(r, cr3) = self;
        write!(f, "\n  rip {:04x}:{:016x} rsp {:04x}:{:016x} ", r.cs, r.rip, r.ss & 0xffff, r.rsp)?;
        write!(f, "rflags {:x} cr3 {cr3:x}", r.rflags)?;
        let general = [
            ("rax", r.rax),
            ("rbx", r.rbx),
            ("rcx", r.rcx),
            ("rdx", r.rdx),
            ("rsi", r.rsi),
            ("rdi", r.rdi),
            ("rbp", r.rbp),
            ("r8 ", r.r8),
            ("r9 ", r.r9),
            ("r10", r.r10),
            ("r11", r.r11),
            ("r12", r.r12),
            ("r13", r.r13),
            ("r14", r.r14),
            ("r15", r.r15),
        ];
        for line in general.chunks(4) {
            f.write_str("\n ")?;
            line.iter().try_for_each(|(name, value)| write!(f, " {name} {value:016x}"))?;
        }
        Ok(())
    }
}

impl Guest {
    /// Carries out the action of `end`, which the configuration chose; `pause` is called after every piece of work.
    /// Returns what is left of the guest, and what could not be removed.
    pub async fn finish<H: Hypervisor, S: Store>(
        self,
        end: &End,
        hypervisor: &H,
        store: &S,
        pause: impl AsyncFn(),
    ) -> (Outcome, Vec<String>) {
        match end.action {
            Action::Preserve => (Outcome::Preserved(self), vec![]),
            Action::Destroy => (Outcome::Gone, self.destroy(hypervisor, store, pause).await),
            Action::Restart => {
                let config = self.config.clone();
                (Outcome::Restart(config), self.destroy(hypervisor, store, pause).await)
            }
        }
    }

    /// Asks the guest to power off or reboot, by writing to the node that it watches.
    ///
    /// # Errors
    /// Those of [`Store::write`].
    pub fn ask<S: Store>(&self, wish: EndRequest, store: &S) -> Result<(), S::Error> {
        let value = match wish {
            EndRequest::Poweroff => "poweroff",
            EndRequest::Reboot => "reboot",
        };
        let path = format!("{}/control/shutdown", home(self.domain));
        store.write(self.domain, &[Node { path, value: value.to_string(), access: Access::Own }])
    }

    /// Tells the guest how much memory it should have, by writing to the node that its balloon driver watches.
    ///
    /// # Errors
    /// Those of [`Store::write`].
    pub fn set_memory_target<S: Store>(&self, mib: u64, store: &S) -> Result<(), S::Error> {
        let path = format!("{}/memory/target", home(self.domain));
        store.write(self.domain, &[Node { path, value: (mib << 10).to_string(), access: Access::Read }])
    }

    /// Renames the guest, also in the store.
    ///
    /// # Errors
    /// Those of [`Store::write`]; the guest then keeps its name.
    pub fn rename<S: Store>(&mut self, name: &str, store: &S) -> Result<(), S::Error> {
        let node = |folder: String| Node { path: folder + "/name", value: name.to_string(), access: Access::Read };
        store.write(self.domain, &[node(home(self.domain)), node(vm(&self.uuid))])?;
        self.config.name = name.to_string();
        Ok(())
    }
}
