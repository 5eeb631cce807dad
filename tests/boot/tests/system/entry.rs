//! The entry table where its answers depend on who asks: in dom0's place, and in a guest that dom0 has made. Alone, as the
//! first domain without authority, it is a test of its guest like any other.

use crate::stories::{SOON, dom0, image, start, test_guest};
use anyhow::{Context, Result, ensure};
use boot::{FIRST_GUEST, Machine, Setup};
use std::fs;
use std::time::Duration;
use xtask::bundle::{Bundle, Guest};
use xtask::xen;

/// What the table says in the end.
const SUM: &str = "entry table: ";
/// A cell by which the domain ends.
const CELL: &str = "entry cell ";

/// Shows the sum of the table on a console, which must have nothing wrong in it.
fn sum(console: &str, who: &str) -> Result<()> {
    let found = console.lines().find_map(|line| line.split_once(SUM));
    let (_, sum) = found.with_context(|| format!("no sum\n{console}"))?;
    println!("entry table, {who}: {}", sum.trim_end());
    ensure!(sum.contains(" 0 wrong"), "{sum}");
    Ok(())
}

/// The same image on Xen: what the table expects is what Xen answers.
pub(crate) fn the_entry_table_holds_on_xen() -> Result<()> {
    let xen = xen::hypervisor(&boot::shell()?)?;
    let limit = Duration::from_secs(60);
    let (title, guest) = ("the_entry_table_holds_on_xen", image("entry")?);
    let mut machine = Machine::boot_on_xen(title, &xen, (&guest, "test=*", None), limit)?;
    machine.expect("@@ done: ", limit)?;
    machine.expect("\n", SOON)?;
    let console = machine.console();
    sum(&console, &xen.version)?;
    ensure!(console.contains("@@ done: passed"), "{console}");
    Ok(())
}

/// With authority over others and no others there.
pub(crate) fn the_entry_table_holds_for_dom0() -> Result<()> {
    let mut setup = Setup::new(Bundle::dom0(&image("entry")?, "test=*"));
    setup.options = "dom0_max_vcpus=2".into();
    let outcome = Machine::boot("the_entry_table_holds_for_dom0", &setup)?.finish()?;
    outcome.require_passed()?;
    sum(&outcome.console, "dom0")
}

/// Without authority, beside dom0; and each call that ends its domain in a domain of its own, which dom0 sees end.
pub(crate) fn the_entry_table_holds_for_a_guest() -> Result<()> {
    let entry =
        |name: &str, extra: &str| -> Result<Guest> { Ok(Guest { vcpus: 2, ..test_guest(name, "entry", extra)? }) };
    let bundle = dom0("consoles=all")?.guest(&entry("table", "test=*")?);
    let outcome = start("the_entry_table_holds_for_a_guest", bundle)?.finish()?;
    outcome.require_success()?;
    outcome.require_line("table| @@ done: passed")?;
    sum(&outcome.console, "a guest")?;
    let cells = outcome.console.lines().filter_map(|line| line.split_once(CELL)).count();
    ensure!(cells > 0, "no call ends its domain\n{}", outcome.console);
    let mut bundle = dom0("consoles=all")?;
    for cell in 0..cells {
        bundle = bundle.guest(&entry(&format!("cell{cell}"), &format!("cell={cell}"))?);
    }
    let mut setup = Setup::new(bundle);
    setup.limit = Duration::from_secs(120);
    let outcome = Machine::boot("the_entry_table_ends_guests", &setup)?.finish()?;
    // Some of them crash, which dom0 passes on.
    outcome.require_failure()?;
    ensure!(!outcome.console.contains("still alive"), "a call came back\n{}", outcome.console);
    for cell in 0..cells {
        let said = format!("cell{cell}| {CELL}{cell}: ");
        let target = outcome.console.lines().find_map(|line| line.split_once(&said));
        let (_, target) = target.with_context(|| format!("cell {cell} was not tried\n{}", outcome.console))?;
        let ended = if target.starts_with("Iret") { "crashed" } else { "powered off" };
        outcome.require_line(&format!("guest cell{cell} (domain {}) {ended}", cell + usize::from(FIRST_GUEST)))?;
    }
    println!("entry table, calls without an answer: {cells} of {cells} end their domain as documented");
    Ok(())
}

/// What the document says of where we differ from Xen is what a guest sees, row by row.
pub(crate) fn the_table_of_differences_is_true() -> Result<()> {
    let path = boot::shell()?.current_dir().join("hypercall-abi/doc/differences.md");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rows = text.lines().filter(|line| line.starts_with("| ")).skip(2);
    let bundle = dom0("consoles=all")?.guest(&test_guest("other", "differences", "")?);
    let outcome = start("the_table_of_differences_is_true", bundle)?.finish()?;
    outcome.require_success()?;
    let mut documented = 0;
    for row in rows {
        let cells: Vec<&str> = row.splitn(4, " | ").collect();
        let [what, answer, _] = cells[..] else { anyhow::bail!("a row without three cells: {row}") };
        outcome.require_line(&format!("other| {what} | {answer} |"))?;
        documented += 1;
    }
    let tried = outcome.console.matches("other| | ").count();
    ensure!(tried == documented && documented > 30, "{documented} rows in the document, {tried} of the guest");
    println!("differences from Xen: {documented} answers are as documented");
    Ok(())
}

/// Ways to end of the guest that tries the hypervisor's fast paths, and what is said of each.
const ENDS: &[(&str, &str)] = &[
    ("call-unmapped", "no stack at"),
    ("call-flushed", "no stack at"),
    ("call-readonly", "no stack at"),
    ("call-hole", "no stack at"),
    ("call-nowhere", "no stack at"),
    ("call-null", "no stack at"),
    ("wait-other", "no stack at"),
    ("fault-unmapped", "no stack at"),
    ("fault-readonly", "no stack at"),
    ("fault-gateless", "no handler for exception 14 (error 0x4)"),
    ("iret-popped", "iret with a bad stack at"),
    ("iret-rootless", "iret to user mode without a user page table"),
];

/// A guest whose entries find no stack, no handler or no root ends with the same words, with the fast paths and without.
pub(crate) fn guests_without_a_stack_end_the_same_way() -> Result<()> {
    let [short, long] = ["lean=on", "lean=off"].map(|options| -> Result<Vec<String>> {
        let mut bundle = dom0("consoles=all")?;
        for (end, _) in ENDS {
            bundle = bundle.guest(&Guest { vcpus: 2, ..test_guest(end, "stubs", &format!("end={end}"))? });
        }
        let mut setup = Setup::new(bundle);
        (setup.limit, setup.options) = (Duration::from_secs(120), options.into());
        let outcome = Machine::boot(&format!("guests_without_a_stack_end_with_{options}"), &setup)?.finish()?;
        outcome.require_failure()?;
        ensure!(!outcome.console.contains("still alive"), "a guest did not end\n{}", outcome.console);
        // Ring 0's lines are whole, but may follow a part of a guest's.
        let lines = outcome
            .console
            .lines()
            .filter_map(|line| Some(&line[line.find("[warn] ").or(line.find("[info] rip "))?..]));
        let mut said: Vec<String> = lines.map(str::to_owned).collect();
        said.sort();
        Ok(said)
    });
    let (short, long) = (short?, long?);
    for ((end, why), domain) in ENDS.iter().zip(FIRST_GUEST..) {
        let told = short.iter().any(|line| line.contains(&format!("d{domain}v0 ")) && line.contains(why));
        ensure!(told, "{end}: {why:?} was to be told\n{}", short.join("\n"));
    }
    ensure!(short == long, "with the fast paths:\n{}\nwithout:\n{}", short.join("\n"), long.join("\n"));
    Ok(())
}
