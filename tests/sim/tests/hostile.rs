//! Hostile guests against the whole of the rules, on 1, 2 and 4 CPUs. `SEED=` and `CPUS=` repeat a run, `STEPS=` prolongs it.

use hypercall_abi::Hypercall;
use sim::wish;
use sim::world::{SHARES, Share, Totals, hostile};
use std::ops::Range;

/// Calls that are not refused whatever their arguments.
const OFFERED: [Hypercall; 30] = [
    Hypercall::SetTrapTable,
    Hypercall::MmuUpdate,
    Hypercall::SetGdt,
    Hypercall::StackSwitch,
    Hypercall::SetCallbacks,
    Hypercall::FpuTaskswitch,
    Hypercall::SetDebugreg,
    Hypercall::GetDebugreg,
    Hypercall::UpdateDescriptor,
    Hypercall::MemoryOp,
    Hypercall::Multicall,
    Hypercall::UpdateVaMapping,
    Hypercall::SetTimerOp,
    Hypercall::XenVersion,
    Hypercall::ConsoleIo,
    Hypercall::GrantTableOp,
    Hypercall::VmAssist,
    Hypercall::UpdateVaMappingOtherdomain,
    Hypercall::Iret,
    Hypercall::VcpuOp,
    Hypercall::SetSegmentBase,
    Hypercall::MmuextOp,
    Hypercall::NmiOp,
    Hypercall::SchedOp,
    Hypercall::CallbackOp,
    Hypercall::EventChannelOp,
    Hypercall::PhysdevOp,
    Hypercall::Domctl,
    Hypercall::Sysctl,
    Hypercall::Tenon,
];

/// Operations without which a run means little.
const MUST_SUCCEED: &[(Hypercall, &[&str])] = &[
    (Hypercall::Domctl, &["CreateDomain", "DestroyDomain", "SetVcpuContext", "GetVcpuContext", "PauseDomain"]),
    (Hypercall::EventChannelOp, &["BindInterdomain", "BindVirq", "BindIpi", "BindVcpu", "Close", "Reset", "Send"]),
    (Hypercall::GrantTableOp, &["MapGrantRef", "UnmapGrantRef", "UnmapAndReplace", "Copy", "SetupTable"]),
    (Hypercall::MemoryOp, &["DecreaseReservation", "IncreaseReservation", "PopulatePhysmap"]),
    (Hypercall::MmuextOp, &["PinL1", "PinL2", "PinL3", "PinL4", "Unpin", "NewBaseptr", "NewUserBaseptr", "SetLdt"]),
    (Hypercall::SchedOp, &["Block", "Poll", "RemoteShutdown", "Yield"]),
    (Hypercall::VcpuOp, &["Initialise", "Up", "Down", "RegisterVcpuInfo", "SendNmi", "SetSingleshotTimer"]),
];

/// Steps on each number of CPUs.
const STEPS: u64 = 800_000;
/// Worlds on each number of CPUs, at most: what they are made of is not given back.
const WORLDS: u64 = 80;

#[test]
fn hostile_guests_never_break_a_promise() {
    let only = wish("CPUS", 0);
    SHARES.into_iter().filter(|share| [0, share.cpus as u64].contains(&only)).for_each(never_break_a_promise);
}

#[test]
fn a_seed_reproduces_a_run_on_several_cpus() {
    let [one, other] = [(); 2].map(|()| run(5..6, 4, 4_000));
    assert_eq!(one.to_string(), other.to_string());
}

fn run(seeds: Range<u64>, cpus: usize, steps: u64) -> Totals {
    let runs = sim::live_each(seeds, |seed| hostile::run(seed, cpus, steps));
    runs.unwrap_or_else(|why| panic!("{why}")).into_iter().collect()
}

fn never_break_a_promise(share: Share) {
    let (cpus, first, steps) = (share.cpus, wish("SEED", 1), wish("STEPS", STEPS));
    let length = steps.div_ceil(WORLDS).max(30_000);
    let totals = run(first..first + steps.div_ceil(length), cpus, length.min(steps));
    println!("{totals}");
    sim::tell(format_args!("hostile guests on {cpus} CPUs: {}", totals.sum()));
    if steps < STEPS {
        return; // too few to have seen everything
    }
    assert!(totals.audits >= share.hostile, "{} audits of all on {cpus} CPUs", totals.audits);
    for call in Hypercall::ALL {
        assert!(totals.of(call.name()).0 > 0, "{} is called", call.name());
    }
    for call in OFFERED {
        let (tried, done) = totals.of(call.name());
        assert!(done * 50 > tried, "{}: {done} of {tried} calls succeed", call.name());
    }
    for (family, ops) in MUST_SUCCEED {
        for op in *ops {
            let done = totals.calls.get(&(family.name(), *op)).map_or(0, |n| n.1);
            // On several CPUs guests do more on purpose, and a vcpu whose context is set must not be running.
            let few = if cpus > 1 { 10 } else { 40 };
            assert!(done >= few, "{} {op} succeeds {done} times", family.name());
        }
    }
    // An episode is 4,000 steps, and what comes after it takes a few hundred.
    for (what, least) in [
        ("times everything was destroyed", steps / 6_000),
        ("steps that left a call unfinished", 1_000),
        ("instructions carried out, or faults repaired", 200),
        ("exits by SYSENTER", 100),
        ("single steps", 500),
        ("steps while other CPUs were at work", if cpus > 1 { steps / 2 } else { 0 }),
    ] {
        let seen = totals.events.get(what).copied().unwrap_or(0);
        assert!(seen >= least, "{what}: {seen}, and {least} are few");
    }
    let given_up = totals.events.get("worlds given up for lack of memory").copied().unwrap_or(0);
    assert_eq!(given_up, 0, "worlds that did not come to an end");
}
